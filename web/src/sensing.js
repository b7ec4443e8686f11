// What a browser tells of its device.  A signal that the browser does not have stays null: unknown, never calm.

import tables from "./control/tables.json" with { type: "json" };

export class Sensors {
  constructor() {
    this.readings = { device_state: null, battery_fraction: null, discharging: null, saving: null, hidden: null };
    this.leftS = null;  // time in s that the battery lasts, as the browser says
    this.ends = [];
  }

  // Begins to follow the device.  onChange: called when a reading changes.
  async start(onChange = () => {}) {
    const set = values => {
      Object.assign(this.readings, values);
      onChange(this.readings);
    };
    const follow = (target, name, update) => {
      target.addEventListener(name, update);
      this.ends.push(() => target.removeEventListener(name, update));
      update();
    };
    follow(document, "visibilitychange", () => set({ hidden: document.hidden }));
    const saves = globalThis.matchMedia?.("(prefers-reduced-data: reduce)");
    const saving = () => set({ saving: Boolean(navigator.connection?.saveData || saves?.matches) });
    if (navigator.connection) follow(navigator.connection, "change", saving);
    else saving();
    await Promise.all([this.#followPressure(set), this.#followBattery(set, follow)]);
  }

  async #followPressure(set) {
    if (!globalThis.PressureObserver) return;
    try {
      const observer = new PressureObserver(records => {
        const state = tables.device_states.indexOf(records[records.length - 1].state);
        set({ device_state: state < 0 ? null : state });
      });
      await observer.observe("cpu", { sampleInterval: 1000 });
      this.ends.push(() => observer.disconnect());
    } catch {
      // Not permitted here, or no such source.
    }
  }

  async #followBattery(set, follow) {
    const battery = await navigator.getBattery?.().catch(() => null);
    if (!battery) return;
    const update = () => {
      this.leftS = !battery.charging && Number.isFinite(battery.dischargingTime) ? battery.dischargingTime : null;
      set({ battery_fraction: battery.level, discharging: !battery.charging });
    };
    for (const name of ["levelchange", "chargingchange", "dischargingtimechange"]) follow(battery, name, update);
  }

  stop() {
    for (const end of this.ends.splice(0)) end();
  }
}
