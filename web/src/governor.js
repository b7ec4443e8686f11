// Reads the sensors, runs the controller, and sets the budget of an engine: runtime/mbq_runtime/control/governor.py.

import { start, step } from "./control/step.js";
import { BudgetTrim } from "./control/trim.js";
import { Policy } from "./control/triggers.js";

const PERIOD_MS = 400;
const FORGET_S = 3;  // a speed older than this, and older than three tokens, is forgotten
const now_s = () => performance.now() / 1000;

export class Governor {
  // sensors: see sensing.js.  onStatus: called after each look with {bits, reason, readings, tokensPerS, bitsUsed}.
  constructor(engine, sensors, onStatus = () => {}, policy = "auto") {
    this.engine = engine;
    this.sensors = sensors;
    this.onStatus = onStatus;
    this.tokens = [];
    this.lastTokenS = now_s();
    this.speed = { tokensPerS: null, bitsUsed: null };
    this.ceilingBits = engine.maxBits;
    this.setPolicy(policy);
    this.restart();
    this.endListening = engine.listen((seconds, bits) => {
      this.tokens.push([seconds, bits]);
      if (now_s() - this.lookedS >= PERIOD_MS / 1000) this.look();
    });
    this.timer = setInterval(() => {
      if (now_s() - this.lookedS >= 1.5 * PERIOD_MS / 1000) this.look();
    }, PERIOD_MS / 2);
  }

  // Forgets what was: the budget is the ceiling.
  restart() {
    this.state = start(this.policy);
    this.trim = new BudgetTrim(this.state.bits);
    this.look();
  }

  // The most bits that the user wants.
  setCeiling(bits) {
    this.ceilingBits = Math.min(Math.max(bits, this.engine.minBits), this.engine.maxBits);
    this.setPolicy(this.policy.name);
    this.look();
  }

  setPolicy(name) {
    const { manifest, minBits } = this.engine;
    const floor = Math.max(minBits, manifest.quality?.floor_bits ?? minBits);
    const bytesAt = Object.entries(manifest.weights.bytes_per_token).map(([bits, bytes]) => [Number(bits), bytes]);
    this.policy = new Policy(name, {
      floorBits: Math.min(floor, this.ceilingBits), ceilingBits: this.ceilingBits, bytesAt: bytesAt.sort((a, b) => a[0] - b[0]),
    });
  }

  look() {
    this.lookedS = now_s();
    this.#count();
    const readings = { ...this.sensors.readings, tokens_per_s: this.speed.tokensPerS, decode_bits: this.speed.bitsUsed };
    const { state, budget, reason } = step(this.state, readings, this.lookedS, this.policy);
    this.state = state;
    this.trim = this.trim.at(budget);
    this.engine.avgBits = Object.keys(this.policy.bands).length
      ? this.trim.request(this.engine.minBits, this.engine.maxBits) : budget;
    this.status = { bits: Math.min(budget, this.engine.ceilingBits), reason, readings, ...this.speed };
    this.onStatus(this.status);
  }

  #count() {
    const tokens = this.tokens.splice(0), now = now_s();
    if (!tokens.length) {
      const { tokensPerS } = this.speed;
      if (tokensPerS && now - this.lastTokenS >= Math.max(FORGET_S, 3 / tokensPerS)) this.speed = { tokensPerS: null, bitsUsed: null };
      return;
    }
    this.lastTokenS = now;
    const spent = tokens.reduce((sum, [seconds]) => sum + seconds, 0);
    const whole = this.engine.whole || this.trim.budget <= this.engine.ceilingBits;
    if (whole) for (const [, bits] of tokens) this.trim = this.trim.after(bits);
    this.speed = {
      tokensPerS: tokens.length / Math.max(spent, 1e-9), bitsUsed: tokens.reduce((sum, [, bits]) => sum + bits, 0) / tokens.length,
    };
  }

  stop() {
    clearInterval(this.timer);
    this.endListening();
  }
}
