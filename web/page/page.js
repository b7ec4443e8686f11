// The page: a chat with the bundle beside it, and what this device does for it.

import { Governor, load, MbqError, probe, Sensors } from "./mbq.js";

const el = id => document.getElementById(id);
const LOCK = `mbq-model ${new URL("./", location.href).pathname}`;
const KEY = "mbq-key";
const POLICIES = { auto: "heat and battery", battery: "battery first", cool: "stay cool", quality: "quality first", fixed: "nothing" };
const STATES = ["nominal", "fair", "serious", "critical"];
const IDEAS = ["Tell me about the sea.", "Write a short poem about rain.", "How does a bicycle stay upright?"];
const VARIED = { temperature: 0.7, topP: 0.95 };

const sensors = new Sensors();
const page = { engine: null, governor: null, messages: [], stopping: null, tokens: 0, app: {}, release: null };
window.mbq = page;  // for the console, and for tests

const megabytes = bytes => `${Math.max(1, Math.round(bytes / 1e6))} MB`;

// One line about what is wrong, with a button for what helps; null removes it.
function trouble(text, label = null, act = null) {
  const line = el("trouble"), button = line.querySelector("button");
  line.hidden = !text;
  line.querySelector("span").textContent = text ?? "";
  button.hidden = !label;
  button.textContent = label ?? "";
  button.onclick = act && (() => {
    trouble(null);
    act();
  });
}

const said = error => error instanceof MbqError ? error.message : `this page has a fault: ${error.message}`;

async function main() {
  sensors.start().catch(() => {});
  if ("serviceWorker" in navigator) navigator.serviceWorker.register("worker.js").catch(() => {});
  window.addEventListener("beforeinstallprompt", event => {
    event.preventDefault();
    el("install").hidden = false;
    el("install").onclick = () => event.prompt();
  });
  for (const [name, label] of Object.entries(POLICIES)) el("policy").append(new Option(label, name));
  for (const idea of IDEAS) {
    const button = document.createElement("button");
    button.textContent = idea;
    button.onclick = () => ask(idea);
    el("ideas").append(button);
  }
  await welcome();
}

// What the bundle needs, and a button that loads it.
async function welcome() {
  try {
    page.app = await (await fetch("app.json")).json();
  } catch {
    page.app = { bundle: "./bundle/" };
  }
  try {
    page.found = await probe(page.app.bundle, options());
  } catch (error) {
    if (error.kind === "key") return askKey();
    el("facts").textContent = said(error);
    if (error.kind === "network") trouble("the bundle cannot be loaded now", "Try again", welcome);
    return;
  }
  const { name, startBytes, totalBytes, kept, gpuBytes, warning } = page.found;
  el("model").textContent = document.title = name;
  el("greeting").textContent = name;
  el("facts").textContent = kept
    ? "It is on this device already."
    : `It runs on this device.\nWhat you write stays here.\n\n${megabytes(startBytes)} before the first word,\n` +
      `${megabytes(totalBytes)} in all, ${megabytes(gpuBytes)} of memory.\nIt works offline after that.`;
  el("warning").textContent = warning ?? "";
  el("warning").hidden = !warning;
  el("load").hidden = false;
  el("load").onclick = open;
  if (kept) await open();
}

const options = () => {
  const key = sessionStorage.getItem(KEY);
  return { depth: page.app.depth ?? null, headers: key ? { Authorization: `Bearer ${key}` } : {} };
};

function askKey() {
  el("facts").textContent = "This server needs its API key.";
  el("door").hidden = false;
  el("door").onsubmit = event => {
    event.preventDefault();
    sessionStorage.setItem(KEY, el("key").value);
    el("door").hidden = true;
    welcome();
  };
}

// One tab at a time has the model in the GPU's memory: the one with the lock.
function take(steal) {
  if (!navigator.locks || page.release) return Promise.resolve(true);
  return new Promise(resolve => {
    const held = navigator.locks.request(LOCK, steal ? { steal: true } : { ifAvailable: true }, lock => {
      resolve(lock !== null);
      return lock && new Promise(release => page.release = release);
    });
    held.catch(() => {  // another tab took it
      page.release = null;
      close();
      trouble("another tab took the model", "Use it here", () => open({ steal: true }));
    });
  });
}

function giveBack() {
  page.release?.();
  page.release = null;
}

function close() {
  page.stopping?.abort();
  page.governor?.stop();
  page.engine?.close();
  page.governor = page.engine = page.found = null;
  el("composer").hidden = true;
}

async function open({ steal = false } = {}) {
  el("load").hidden = true;
  if (!await take(steal)) {
    trouble("another tab of this page has the model", "Use it here", () => open({ steal: true }));
    return;
  }
  el("progress").hidden = false;
  try {
    page.found ??= await probe(page.app.bundle, options());
    if (!page.found.device.alive) page.found = await probe(page.app.bundle, options());
    const on = {
      progress: (done, count) => el("progress").value = done / count,
      trouble: (error, wait_s, engine) => {
        if (error === null) trouble(null);
        else if (wait_s === null) trouble(`${said(error)}; it goes on with ${engine.ceilingBits} bits`, "Try again", () => engine.resume());
        else trouble(`${said(error)}; tried again in ${wait_s} s`);
      },
      lost,
      depth: () => page.governor?.look(),
    };
    page.engine = await load(page.app.bundle, { ...options(), found: page.found, on });
  } catch (error) {
    el("progress").hidden = true;
    giveBack();
    page.found = null;
    if (error.kind === "key") askKey();  // what this page read before was kept
    else trouble(said(error), "Try again", open);
    return;
  }
  page.governor = new Governor(page.engine, sensors, show, el("policy").value || "auto");
  if (page.most) page.governor.setCeiling(page.most);
  el("welcome").hidden = true;
  el("ideas").hidden = page.messages.length > 0;
  for (const id of ["gauges", "why", "composer", "new", "set"]) el(id).hidden = false;
  Object.assign(el("limit"), { min: page.engine.minBits, max: page.engine.maxBits, step: 0.5, value: page.governor.ceilingBits });
  el("most").textContent = page.governor.ceilingBits;
  el("text").focus();
}

async function lost(error) {
  if (!page.engine || page.engine.closed) return;
  close();
  trouble(`${said(error)}; the model is loaded again`);
  await open();
  if (page.engine) trouble(null);
}

// What the governor found.
function show({ bits, reason, readings, tokensPerS, bitsUsed }) {
  const { engine } = page;
  const set = (id, text, hot = false) => {
    const place = el(id);
    place.querySelector("b").textContent = text;
    place.classList.toggle("hot", hot);
    place.classList.toggle("word", text.length > 5);
  };
  set("bits", bits.toFixed(1));
  if (engine) {
    el("bits").style.setProperty("--part", `${100 * bits / engine.maxBits}%`);
    el("bits").querySelector("small").textContent = `of ${engine.maxBits} bits`;
  }
  el("bits").title = bitsUsed === null ? "" : `used ${bitsUsed.toFixed(2)}`;
  set("speed", tokensPerS === null ? "idle" : tokensPerS.toFixed(1));
  set("device", STATES[readings.device_state] ?? "–", readings.device_state > 1);
  const { battery_fraction: left, discharging } = readings;
  const hours = sensors.leftS === null ? "" : `, ${(sensors.leftS / 3600).toFixed(1)} h`;
  set("battery", left === null ? "–" : `${Math.round(100 * left)} %`, discharging && left < 0.15);
  el("battery").querySelector("small").textContent = left === null ? "battery" : discharging ? `battery${hours}` : "plugged in";
  const coming = engine && !engine.whole ? ` · ${engine.ceilingBits} bits are here, more are coming` : "";
  el("why").textContent = reason + coming;
}

function bubble(kind, text) {
  const made = document.createElement(kind === "note" ? "p" : "article");
  made.className = kind;
  made.textContent = text;
  el("talk").append(made);
  made.scrollIntoView({ block: "end" });
  return made;
}

async function answer(text) {
  const { engine, messages } = page;
  el("ideas").hidden = true;
  messages.push({ role: "user", content: text });
  bubble("user", text);
  const place = bubble("assistant", ""), stopping = page.stopping = new AbortController();
  place.classList.add("waiting");
  el("send").textContent = "Stop";
  let reply = "", tokens = page.tokens = 0, spent = 0, bits = 0, first = 0;
  try {
    const prompt = engine.tokenizer.hasChatTemplate ? messages : `${messages.map(m => m.content).join("\n")}\n`;
    for await (const piece of engine.generate(prompt, { ...(el("varied").checked ? VARIED : {}), maxTokens: Infinity, signal: stopping.signal })) {
      const talk = el("talk"), follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
      reply += piece.text;
      place.append(piece.text);
      bits += piece.bits;
      page.tokens = ++tokens;
      if (tokens === 1) first = piece.seconds;
      else spent += piece.seconds;
      if (follows) talk.scrollTop = talk.scrollHeight;
    }
    if (tokens > 1 && messages === page.messages) {
      bubble("note", `${tokens} tokens, ${((tokens - 1) / spent).toFixed(1)} tokens/s, ${(bits / tokens).toFixed(1)} bits, ${first.toFixed(1)} s to the first`);
    }
  } catch (error) {
    if (error.kind === "usage") trouble(said(error), "New conversation", begin);
    else if (error.kind !== "lost") trouble(said(error));
    bubble("note", "the reply was cut off");
  }
  place.classList.remove("waiting");
  messages.push({ role: "assistant", content: reply });
  page.stopping = null;
  el("send").textContent = "Send";
}

function begin() {
  page.stopping?.abort();
  page.messages = [];
  for (const old of el("talk").querySelectorAll("article, .note")) old.remove();
  el("ideas").hidden = !page.engine;
}

function ask(text) {
  if (!text || !page.engine || page.stopping) return;
  el("text").value = "";
  el("text").style.height = "";
  answer(text);
}

el("composer").onsubmit = event => {
  event.preventDefault();
  if (page.stopping) page.stopping.abort();
  else ask(el("text").value.trim());
};
el("text").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!page.stopping) el("composer").requestSubmit();
  }
};
el("text").oninput = () => {
  el("text").style.height = "";
  el("text").style.height = `${el("text").scrollHeight + 2}px`;
};
el("new").onclick = begin;
el("set").onclick = () => {
  const opens = el("settings").hidden;
  el("settings").hidden = !opens;
  el("set").setAttribute("aria-expanded", String(opens));
};
el("limit").oninput = () => {
  page.most = Number(el("limit").value);
  el("most").textContent = page.most;
  page.governor?.setCeiling(page.most);
};
el("policy").onchange = () => {
  page.governor?.setPolicy(el("policy").value);
  page.governor?.look();
};

main();
