// Passes of a plan over tokens, and their cache.  The counterpart of DeviceContext in
// runtime/mbq_runtime/engine/gpu.py; the words of `state` are described in runtime/mbq_runtime/bundle/gpu_plan.py.

import { MbqError } from "./errors.js";

const STATE = "state", RESULT = "result", LOGITS = "logits";
const THRESHOLDS = 4, TOKENS = 8;
const CACHE = -2;
const FLOAT32_MAX = Math.fround(3e38);

// The thresholds of all tables of routers at a budget: at the lowest one no score passes, at the highest every one.
export function thresholds(plan, avgBits) {
  const bits = Math.fround(avgBits);
  return plan.tables.map(({ budgets, thresholds: levels }) => {
    const last = budgets.length - 1;
    if (bits <= Math.fround(budgets[0])) return FLOAT32_MAX;
    if (bits >= Math.fround(budgets[last])) return -FLOAT32_MAX;
    const at = budgets.findIndex(budget => budget > bits) - 1;
    const slope = (levels[at + 1] - levels[at]) / (budgets[at + 1] - budgets[at]);
    return Math.fround(slope * (bits - budgets[at]) + levels[at]);
  });
}

// What a budget under a ceiling is for the kernels.  The counterpart of runtime/mbq_runtime/engine/allowance.py.
export function allowance(depthBits, avgBits, deepest) {
  const atTop = avgBits >= depthBits[deepest - 1];
  return { bits: atTop ? depthBits[depthBits.length - 1] : avgBits, deepest };
}

// The memory of a plan that does not depend on the context.
export function fixedBuffers(plan, device) {
  const fixed = Object.entries(plan.buffers).filter(([, buffer]) => buffer.offset !== CACHE);
  return Object.fromEntries(fixed.map(([name, { bytes }]) => [name, device.buffer(bytes)]));
}

// [buffer name, place in it, place in the weights' file, bytes] of all content of the weights' file.
export function contents(plan) {
  return Object.entries(plan.buffers).filter(([, buffer]) => buffer.offset >= 0).flatMap(([name, buffer]) => {
    let at = 0;
    return (buffer.pieces?.length ? buffer.pieces : [buffer]).map(({ offset, bytes }) => {
      const found = { name, at, offset, bytes };
      at += bytes;
      return found;
    });
  });
}

export class Context {
  // length: most tokens of the context.
  constructor(plan, device, fixed, length) {
    const caches = Object.entries(plan.buffers).filter(([, buffer]) => buffer.offset === CACHE);
    const largest = Math.max(0, ...caches.map(([, buffer]) => buffer.bytes * length));
    if (largest > device.limits.buffer_bytes) {
      const most = Math.floor(length * device.limits.buffer_bytes / largest);
      throw new MbqError("usage", `a context of ${length} tokens needs buffers of ${largest} bytes, ${device.name} takes ` +
        `${device.limits.buffer_bytes}; ask for at most ${most} tokens`);
    }
    this.plan = plan;
    this.device = device;
    this.length = length;
    this.caches = caches.map(([name, buffer]) => [name, device.buffer(buffer.bytes * length)]);
    this.buffers = { ...fixed, ...Object.fromEntries(this.caches) };
    this.programs = Object.fromEntries(
      Object.entries(plan.programs).map(([name, launches]) => [name, device.prepare(launches, this.buffers)]));
    this.state = new Int32Array(TOKENS + plan.chunk);
    this.floats = new Float32Array(this.state.buffer);
    this.tokens = [];  // ids that are in the cache
  }

  // Reads tokens, as many passes as chunks of the plan are needed, and chooses the token that follows.
  // budget: what `allowance` returned.
  append(tokens, budget) {
    for (let start = 0; start < tokens.length; start += this.plan.chunk) {
      const part = tokens.slice(start, start + this.plan.chunk), last = start + part.length === tokens.length;
      const { state } = this;
      state.fill(0);
      state.set([this.tokens.length, part.length, last ? part.length - 1 : 0, budget.deepest]);
      this.floats.set(thresholds(this.plan, budget.bits), THRESHOLDS);
      state.set(part, TOKENS);
      this.device.write(this.buffers[STATE], state);
      const { token, prompt, choose } = this.programs;
      this.device.run(part.length === 1 ? token : prompt, ...(last ? [choose] : []));
      this.tokens.push(...part);
    }
  }

  // The likeliest next token, and the average bits per weight of the last token.
  async result() {
    const found = await this.device.read(this.buffers[RESULT], 8);
    return { token: new Int32Array(found)[0], bits: new Float32Array(found)[1] };
  }

  async logits() {
    return new Float32Array(await this.device.read(this.buffers[LOGITS], 4 * this.plan.vocab_size));
  }

  // Drops the last tokens.  count: tokens that stay.
  rewind(count) {
    this.tokens.length = count;
  }

  // How many tokens at the start of a prompt are in the cache.
  common(prompt) {
    const differs = prompt.findIndex((token, index) => token !== this.tokens[index]);
    return differs < 0 ? prompt.length : differs;
  }

  destroy() {
    for (const [, buffer] of this.caches) buffer.destroy();
  }
}
