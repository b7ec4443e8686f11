// What another page imports.
export { Device } from "./device.js";
export { Engine, load, probe } from "./engine.js";
export { MbqError } from "./errors.js";
export { Governor } from "./governor.js";
export { Sensors } from "./sensing.js";
