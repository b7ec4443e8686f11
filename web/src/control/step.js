// The controller: a pure function from readings to the budget of the next tokens.  It is that of
// runtime/mbq_runtime/control (controller.py, tracks.py, wishes.py) for the signals that a page has; both must give the
// same budgets and reasons for the same readings (tests/web/test_control.py).

import { clamp, general, known } from "./numbers.js";
import { shape, TRIGGERS } from "./triggers.js";

const CLEAR_S = 20, CLEAR_MOST_S = 160, SAFE_S = 5, APART_S = 10, STABLE_S = 600, SETTLED_S = 2, LARGE_BITS = 1;
const LAPSE_S = 1.1, PACE_S = 0.5, LONGEST_S = 60;
const HOLD_S = 30, SLOPE_S = 10, ABSURD = 1e6;
const STEP_BITS = 0.5, HYSTERESIS = 0.08, CONFIRM_S = 1, SMALL_APART_S = 20, KNOWN_APART_S = 10;

// The state before the first step: the budget is the ceiling.
export const start = policy => ({
  bits: policy.ceilingBits, clockS: 0, nowS: null, changedS: -Infinity, roseS: -Infinity, wanted: {}, calmSinceS: null,
  calmBits: 0, clearS: CLEAR_S, cause: "", tracks: {}, bestTps: [], paceS: null, pacedS: 0,
});

// readings: device_state, discharging, battery_fraction, saving, hidden, tokens_per_s, decode_bits; what is null or
// missing is unknown.  now: seconds on any clock.  Gives {state, budget, reason}.
export function step(before, readings, now, policy) {
  const { floorBits: low, ceilingBits: high } = policy;
  const spentS = elapsedS(before, now);
  let state = {
    ...before, clockS: before.clockS + spentS, nowS: Number.isFinite(now) ? now : before.nowS, bits: clamp(before.bits, low, high),
  };
  if (!Object.keys(policy.bands).length) return { state: { ...state, bits: high }, budget: high, reason: "fixed" };
  readings = finite(readings);
  state = paced(state, readings, spentS, policy);
  const rates = state.bestTps.filter(([bits]) => bits >= state.bits).map(([, tps]) => tps);
  const at = { readings, policy, bits: state.bits, bestTps: rates.length ? Math.max(...rates) : null, paceS: state.paceS };
  state = { ...state, tracks: sense(state.tracks, at, state.clockS, spentS) };
  const found = wishes(state.tracks, at, state.clockS);
  const bits = state.bits;
  state = move(state, found, spentS, policy);
  const reason = reasonOf(bits, state, found, at);
  return { state: learn(state, readings), budget: state.bits, reason };
}

// Time in s since the last step: never below 0, and at most a minute after a jump of the clock.
function elapsedS(state, now) {
  return state.nowS === null || !Number.isFinite(now) ? 0 : clamp(now - state.nowS, 0, LONGEST_S);
}

const finite = readings => Object.fromEntries(Object.entries(readings).map(
  ([name, value]) => [name, typeof value === "number" && !Number.isFinite(value) ? null : value]));

function paced(state, readings, spentS, policy) {
  const tps = readings.tokens_per_s;
  if (!(known(tps) && tps > 1e-3 && tps < 1e6)) {
    return state.clockS - state.pacedS <= HOLD_S ? state : { ...state, paceS: null };
  }
  let nowS = 1 / tps / shape(policy.part(readings.decode_bits || state.bits));
  if (state.paceS !== null) nowS = state.paceS + (1 - Math.exp(-spentS / PACE_S)) * (nowS - state.paceS);
  return { ...state, paceS: nowS, pacedS: state.clockS };
}

function learn(state, readings) {
  const tps = readings.tokens_per_s, best = state.bestTps.find(([bits]) => bits === state.bits);
  if (!known(tps) || tps <= (best ? best[1] : 0)) return state;
  return { ...state, bestTps: [...state.bestTps.filter(pair => pair !== best), [state.bits, tps]] };
}

function sense(before, at, clockS, spentS) {
  const tracks = { ...before };
  for (const name of Object.keys(at.policy.bands)) {
    const trigger = TRIGGERS[name], track = tracks[name] ?? null;
    const value = trigger.value(at);
    if (known(value)) {
      const held = track && clockS - track.atS <= HOLD_S ? track : null;
      tracks[name] = smoothed(held, trigger, clamp(value, -ABSURD, ABSURD), at.readings, clockS, spentS);
    } else if (track && !trigger.sensor) {
      delete tracks[name];
    }
  }
  return tracks;
}

function smoothed(track, trigger, value, readings, clockS, spentS) {
  if (track === null) return { value, slope: 0, atS: clockS, readings, latest: value };
  const weight = trigger.smooth_s ? 1 - Math.exp(-spentS / trigger.smooth_s) : 1;
  const change = weight * (value - track.value);
  let { slope } = track;
  if (spentS) slope += (1 - Math.exp(-spentS / SLOPE_S)) * (clamp(change / spentS, -ABSURD, ABSURD) - slope);
  return { value: track.value + change, slope, atS: clockS, readings, latest: value };
}

function grid(low, high) {
  const count = Math.ceil((high - low) / STEP_BITS - 1e-9);
  return [high, ...Array.from({ length: Math.max(count, 0) }, (_, i) => low + (count - 1 - i) * STEP_BITS)];
}

function wishes(tracks, at, clockS) {
  return Object.keys(at.policy.bands)
    .filter(name => tracks[name] && clockS - tracks[name].atS <= HOLD_S)
    .map(name => wishOf(name, tracks[name], at));
}

function wishOf(name, track, at) {
  const trigger = TRIGGERS[name], { floorBits: low, ceilingBits: high } = at.policy;
  const acts = track.latest > trigger.gate;
  if (trigger.need) {
    const budgets = grid(low, high);
    const target = acts ? trigger.need(at, budgets, 0) : high;
    const allowed = acts ? trigger.need(at, budgets, trigger.room) : high;
    if (known(target) && known(allowed)) {
      return { name, target, allowed, known: true, confirmS: trigger.confirm_s, settleS: trigger.settle_s, apartS: KNOWN_APART_S };
    }
  }
  const ahead = clamp(track.slope * trigger.forecast_s, 0, trigger.forecast_most);
  const pressure = at.policy.pressure(name, track.value + ahead);
  return {
    name, target: target(pressure, low, high), allowed: pressure > 0 ? target(pressure + HYSTERESIS, low, high) : high,
    known: false, confirmS: CONFIRM_S, settleS: trigger.settle_s, apartS: SMALL_APART_S,
  };
}

// The budget at a pressure: the floor plus a multiple of STEP_BITS, or the ceiling.
function target(pressure, low, high) {
  return pressure <= 0 ? high : low + Math.max(Math.floor((1 - pressure) * (high - low) / STEP_BITS + 1e-9), 0) * STEP_BITS;
}

const lowestOf = list => list.reduce((least, wish) => least === null || wish.target < least.target ? wish : least, null);

function move(state, found, spentS, policy) {
  const { clockS: nowS, bits } = state, sinceS = nowS - state.changedS;
  const falls = found.filter(wish =>
    wish.target < bits && sinceS >= (bits - wish.target >= LARGE_BITS ? wish.settleS : wish.apartS));
  const lapseS = Math.max(LAPSE_S, spentS);
  const lasting = Object.fromEntries(Object.entries(state.wanted).filter(([, times]) => nowS - times[1] <= lapseS));
  const wanted = { ...lasting };
  for (const wish of falls) wanted[wish.name] = [(lasting[wish.name] ?? [nowS])[0], nowS];
  state = { ...state, wanted };
  const ready = falls.filter(wish => nowS - wanted[wish.name][0] >= wish.confirmS);
  if (ready.length) {
    const lowest = lowestOf(ready);
    const early = nowS - state.roseS < 2 * state.clearS && !lowest.known;
    return {
      ...state, bits: lowest.target, cause: lowest.name, changedS: nowS, wanted: {}, roseS: -Infinity, calmSinceS: null,
      clearS: early ? Math.min(2 * state.clearS, CLEAR_MOST_S) : state.clearS,
    };
  }
  const allowed = found.length ? Math.min(...found.map(wish => wish.allowed)) : policy.ceilingBits;
  if (falls.length || allowed <= bits) return { ...state, calmSinceS: null };
  if (state.calmSinceS === null) return { ...state, calmSinceS: nowS, calmBits: allowed };
  const settled = nowS - state.calmSinceS >= SETTLED_S;
  state = { ...state, calmBits: settled ? Math.min(state.calmBits, allowed) : allowed };
  const isKnown = Boolean(found.find(wish => wish.name === state.cause)?.known);
  const clearS = sinceS > STABLE_S ? CLEAR_S : state.clearS;
  if (nowS - state.calmSinceS < (isKnown ? SAFE_S : clearS) || sinceS < (isKnown ? APART_S : clearS)) return state;
  const most = state.cause && !isKnown ? TRIGGERS[state.cause].rise_bits : Infinity;
  return { ...state, bits: Math.min(state.calmBits, bits + most), changedS: nowS, roseS: nowS, calmSinceS: null, clearS };
}

function reasonOf(before, state, found, at) {
  const lowest = lowestOf(found), high = at.policy.ceilingBits;
  if (lowest && lowest.target < high && lowest.target <= state.bits && state.bits <= before) {
    const wish = state.bits < before ? found.find(one => one.name === state.cause) : lowest;
    const trigger = TRIGGERS[wish.name], { readings } = state.tracks[wish.name];
    return wish.known && trigger.describeNeed
      ? `${wish.name}: ${trigger.describeNeed(at)}: ${general(state.bits)} bits` : trigger.describe(readings);
  }
  const cause = state.cause || "pressure";
  if (state.bits > before) return `${cause} decreased`;
  return state.bits < high ? `${cause} decreased; the budget rises after a calm time` : "no pressure";
}
