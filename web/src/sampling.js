// Chooses a token from logits: temperature, top_k, top_p, min_p, in this order, as runtime/mbq_runtime/engine/sampling.py.

import { MbqError } from "./errors.js";

const OPTIONS = {
  maxTokens: [value => value >= 1 && (Number.isInteger(value) || value === Infinity), "a whole number from 1 on, or Infinity"],
  temperature: [value => value >= 0 && Number.isFinite(value), "a number from 0 on"],
  topK: [value => value >= 0 && Number.isInteger(value), "0 (all tokens) or a whole number above"],
  topP: [value => value > 0 && value <= 1, "a number above 0 and at most 1"],
  minP: [value => value >= 0 && value <= 1, "a number from 0 to 1"],
};

// Raises MbqError where an option of a reply is no number that it can be.
export function checkOptions(options) {
  for (const [name, [holds, needed]] of Object.entries(OPTIONS)) {
    const value = options[name];
    if (value !== undefined && !(typeof value === "number" && holds(value))) {
      throw new MbqError("usage", `${name} ${value}: needed ${needed}`);
    }
  }
}

// A generator of numbers from 0 to 1 that a seed repeats: mulberry32, public domain, by Tommy Ettinger.
export function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = state + 0x6D2B79F5 >>> 0;
    let mixed = Math.imul(state ^ state >>> 15, state | 1);
    mixed ^= mixed + Math.imul(mixed ^ mixed >>> 7, mixed | 61);
    return ((mixed ^ mixed >>> 14) >>> 0) / 2 ** 32;
  };
}

export function choose(logits, { temperature, topK = 0, topP = 1, minP = 0 }, draw) {
  let peak = -Infinity;
  for (const logit of logits) if (logit > peak || Number.isNaN(logit)) peak = logit;
  if (!Number.isFinite(peak)) throw new MbqError("broken", `the model's logits are not finite (${peak}); export the bundle again`);
  // Tokens of less than 1e-7 of the likeliest one's weight are not drawn in practice.
  const least = peak - 16.2 * temperature;
  let found = [];
  logits.forEach((logit, token) => {
    if (logit >= least) found.push({ token, weight: Math.exp((logit - peak) / temperature) });
  });
  found.sort((a, b) => b.weight - a.weight || a.token - b.token);
  if (topK > 0) found = found.slice(0, topK);
  let total = found.reduce((sum, { weight }) => sum + weight, 0), kept = 0;
  if (topP < 1) {
    const end = found.findIndex(({ weight }) => (kept += weight) >= topP * total);
    found = found.slice(0, end < 0 ? found.length : end + 1);
  }
  found = found.filter(({ weight }) => weight >= minP);
  total = found.reduce((sum, { weight }) => sum + weight, 0);
  let at = draw() * total;
  for (const { token, weight } of found) if ((at -= weight) < 0) return token;
  return found[found.length - 1].token;
}
