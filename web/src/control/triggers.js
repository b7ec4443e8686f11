// What a page can know of its device, as triggers of the controller: the rows of runtime/mbq_runtime/control/triggers.py
// whose signals a browser has.  Their numbers come from that table.  A row that is not here has no value.

import { MbqError } from "../errors.js";
import { clamp, fixed, known, percent } from "./numbers.js";
import tables from "./tables.json" with { type: "json" };

// Reading over the whole time of a token at the ceiling, before anything is learned: token_time.py.
const SHARE = 0.62;
const NEAR = 0.01;

const number = value => value === "inf" ? Infinity : value === "-inf" ? -Infinity : value;
const numbers = row => Object.fromEntries(Object.entries(row).map(([name, value]) => [name, number(value)]));

// Time of a token at a budget over its time at the ceiling.
export const shape = part => 1 - SHARE + SHARE * part;

const flag = name => at => known(at.readings[name]) ? Number(at.readings[name]) : null;

function battery({ readings: r }) {
  if (r.discharging === false) return -1;
  return known(r.discharging) && known(r.battery_fraction) ? 1 - r.battery_fraction : null;
}

// The share of its best speed that the model lost.
function pace(at) {
  const tps = at.readings.tokens_per_s;
  return known(tps) && known(at.bestTps) ? 1 - tps / at.bestTps : null;
}

function latency({ policy, readings }) {
  const goal = policy.minTps, tps = readings.tokens_per_s;
  return known(goal) && known(tps) ? 1 - tps / goal : null;
}

// Time of a token in s that is expected at a budget.
const tokenS = (at, bits) => known(at.paceS) ? at.paceS * shape(at.policy.part(bits)) : null;

// The highest budget at which the speed stays at the goal; the lowest one if none is fast enough.
function holdSpeed(at, budgets, room) {
  const goal = at.policy.minTps;
  if (!known(goal)) return null;
  if (!known(at.paceS)) return budgets[0];
  const most = (1 + NEAR) / (goal * (1 + room));
  return budgets.find(bits => tokenS(at, bits) <= most) ?? budgets[budgets.length - 1];
}

function describeHold(at) {
  const goal = at.policy.minTps ?? NaN, expected = tokenS(at, at.policy.floorBits);
  return known(expected) && expected * goal > 1
    ? `${fixed(1 / expected, 1)} of ${fixed(goal, 1)} tokens/s` : `holds ${fixed(goal, 1)} tokens/s`;
}

const text = (value, form) => known(value) ? form(value) : "?";

const HERE = {
  battery: { value: battery, describe: r => `battery: ${text(r.battery_fraction, percent)} left` },
  device: { value: flag("device_state"), describe: r => `device: its state is ${tables.device_states[r.device_state] ?? "?"}` },
  saver: { value: flag("saving"), describe: () => "saver: the user asks to save data" },
  hidden: { value: flag("hidden"), describe: () => "hidden: nobody sees the page" },
  pace: { value: pace, describe: r => `pace: the speed fell to ${text(r.tokens_per_s, v => fixed(v, 1))} tokens/s` },
  latency: {
    value: latency, describe: r => `latency: ${text(r.tokens_per_s, v => fixed(v, 1))} tokens/s`,
    need: holdSpeed, describeNeed: describeHold,
  },
};

export const TRIGGERS = Object.fromEntries(Object.entries(tables.triggers).map(
  ([name, row]) => [name, { ...numbers(row), value: () => null, ...HERE[name] }]));

export class Policy {
  // name: a key of the table's bands.  options: floorBits, ceilingBits (average bits per weight), minTps (tokens/s),
  // bytesAt ([[bits, bytes]], ascending).
  constructor(name, options) {
    if (!Object.hasOwn(tables.bands, name)) {
      throw new MbqError("usage", `policy ${name}: needed one of ${Object.keys(tables.bands).join(", ")}`);
    }
    Object.assign(this, { name, bands: tables.bands[name], minTps: null, bytesAt: [] }, options);
  }

  // Bytes of weights that a token reads at a budget, over its bytes at the highest budget of the bundle.
  part(bits) {
    const { bytesAt } = this;
    if (bytesAt.length < 2) return clamp(bits / this.ceilingBits, 1e-3, 1);
    let index = bytesAt.slice(1).findIndex(([held]) => bits <= held);
    if (index < 0) index = bytesAt.length - 2;
    const [low, least] = bytesAt[index], [high, most] = bytesAt[index + 1];
    const bytes = Math.max(least + (most - least) * (bits - low) / (high - low), 0);
    return clamp(bytes / bytesAt[bytesAt.length - 1][1], 1e-3, 1);
  }

  pressure(name, value) {
    const [start, full] = this.bands[name];
    return clamp((value - start) / (full - start), 0, 1);
  }
}

