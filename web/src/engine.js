// A bundle that runs in this page.
//
//     import { load } from "./mbq.js";
//     const engine = await load("./bundle/");
//     for await (const piece of engine.generate("Tell me about the sea.")) console.log(piece.text);

import { Bundle } from "./bundle.js";
import { allowance, contents, Context, fixedBuffers } from "./context.js";
import { Device } from "./device.js";
import { MbqError } from "./errors.js";
import { checkOptions, choose, random } from "./sampling.js";
import { Store } from "./store.js";
import { Tokenizer } from "./tokenizer.js";

const CONTEXT = 2048;  // tokens; a cache of them takes memory
const MIN_TEMPERATURE = 1e-5;
const RETRY_S = [1, 2, 4, 8, 15];
const EVENTS = ["progress", "depth", "trouble", "lost"];

// What a bundle needs, before anything large is loaded.  Raises MbqError where this browser cannot run it.
// options: headers, depth (of a trimmed bundle), context (tokens).
export async function probe(url, options = {}) {
  const bundle = await Bundle.open(url, await Store.open(), options);
  const device = await Device.open();
  const plan = await bundle.plan();
  device.check(plan);
  const { model } = bundle.manifest;
  const context = Math.min(options.context ?? CONTEXT, model.context_length);
  const gpuBytes = Object.values(plan.buffers).reduce(
    (sum, { bytes, offset }) => sum + bytes * (offset === -2 ? context : 1), 0);
  const memoryBytes = (navigator.deviceMemory ?? 0) * 2 ** 30;  // browsers say 8 GiB at most
  return {
    bundle, device, plan, context, gpuBytes, ...await bundle.sizes(), name: model.name,
    warning: memoryBytes && gpuBytes > memoryBytes / 2
      ? `the model needs ${gigabytes(gpuBytes)} of memory, this device has ${gigabytes(memoryBytes)}: it may not fit` : null,
  };
}

const gigabytes = bytes => `${(bytes / 1e9).toFixed(1)} GB`;

// Loads a bundle.  It is ready as soon as its first slices are there; the others come while it runs.
// url: the bundle's folder.  options: those of `probe`, and on (handlers by name: progress, depth, trouble, lost).
export async function load(url, options = {}) {
  const found = options.found ?? await probe(url, options);
  const engine = new Engine(found, options.on);
  try {
    await engine.start();
  } catch (error) {
    engine.close();
    throw error;
  }
  return engine;
}

export class Engine {
  #wish;
  #busy = false;

  constructor({ bundle, device, plan, context }, on = {}) {
    this.bundle = bundle;
    this.manifest = bundle.manifest;
    this.device = device;
    this.plan = plan;
    this.contextLength = context;
    this.depth = 0;  // slices that are there
    this.limitDepth = bundle.deepest;
    this.loaded = 0;
    this.on = on;
    this.closed = false;
    this.listeners = new Set();
    this.#wish = Math.min(bundle.manifest.budget.default_bits, this.maxBits);
    device.lost.then(error => this.#tell("lost", error));
  }

  get name() { return this.manifest.model.name; }
  get minBits() { return this.manifest.budget.min_bits; }
  get maxBits() { return this.bundle.depthBits[this.bundle.deepest - 1]; }

  // Most bits per weight of the slices that are there.
  get ceilingBits() { return this.bundle.depthBits[Math.max(this.depth, 1) - 1]; }

  // The budget: average bits per weight that a token may use.  A new value takes effect at the next token.
  get avgBits() { return Math.min(this.#wish, this.ceilingBits); }

  set avgBits(value) {
    if (!(value >= this.minBits && value <= this.manifest.budget.max_bits)) {
      throw new MbqError("usage", `average bits ${value}: ${this.name} takes a number from ${this.minBits} to ` +
        `${this.manifest.budget.max_bits}`);
    }
    this.#wish = value;
  }

  get whole() { return this.depth === this.bundle.deepest; }

  #tell(name, ...values) {
    if (EVENTS.includes(name) && !this.closed) this.on[name]?.(...values);
  }

  // Resolves when the first slices are there.  The others follow by themselves.
  async start() {
    const { bundle, device, plan } = this;
    const names = Object.keys(plan.kernels);
    const [document, config, template, settings, ...texts] = await Promise.all([
      bundle.json("tokenizer.json"), bundle.json("tokenizer_config.json"), bundle.text("chat_template.jinja"),
      bundle.json("genai_config.json"), ...names.map(name => bundle.kernel(plan.kernels[name].file)),
    ]);
    this.tokenizer = new Tokenizer(document, config ?? {}, template);
    this.endTokens = new Set([settings.model.eos_token_id].flat());
    this.promptChunk = settings.search.chunk_size;
    this.pieces = contents(plan).sort((a, b) => a.offset - b.offset);
    await device.allocating(() => this.fixed = fixedBuffers(plan, device));
    let ready, failed;
    const first = new Promise((resolve, reject) => [ready, failed] = [resolve, reject]);
    // The weights come while the kernels are compiled.
    this.coming = this.#fetchWeights(ready).catch(error => {
      this.failure = error;
      if (this.depth) this.#tell("trouble", error, null, this);
      failed(error);
    });
    const compiled = device.compile(plan.kernels, Object.fromEntries(names.map((name, index) => [name, texts[index]])))
      .then(() => device.allocating(() => this.context = new Context(plan, device, this.fixed, this.contextLength)));
    const gone = device.lost.then(error => Promise.reject(error));
    await Promise.race([Promise.all([first, compiled]), gone]);
  }

  // Goes on with a download that ended with an error.
  resume() {
    if (!this.failure || this.closed) return;
    this.failure = null;
    this.coming = this.#fetchWeights(() => {}).catch(error => {
      this.failure = error;
      this.#tell("trouble", error, null, this);
    });
  }

  async #fetchWeights(ready) {
    for (let tries = 0; !this.closed && this.device.alive;) {
      try {
        for await (const chunk of this.bundle.weights(this.loaded)) {
          if (this.closed || !this.device.alive) return;
          this.#upload(chunk);
          this.loaded = chunk.index + 1;
          if (tries) this.#tell("trouble", null, null);
          tries = 0;
          this.#tell("progress", this.loaded, chunk.count);
          if (chunk.depth) {
            this.depth = chunk.depth;
            this.#tell("depth", this.ceilingBits);
            ready();
          }
        }
        return;
      } catch (error) {
        if (error.kind !== "network") throw error;
        const wait_s = RETRY_S[Math.min(tries++, RETRY_S.length - 1)];
        this.#tell("trouble", error, wait_s, this);
        await pause(wait_s);
      }
    }
  }

  // Puts a chunk of the weights' file where the plan wants it.
  #upload({ begin, end, bytes }) {
    for (const { name, at, offset, bytes: size } of this.pieces) {
      const from = Math.max(begin, offset), to = Math.min(end, offset + size);
      if (from < to) this.device.write(this.fixed[name], bytes.subarray(from - begin, to - begin), at + from - offset);
    }
  }

  // The ids of a prompt: a text, a conversation [{role, content}], or ids.
  promptIds(prompt, { chat = true, templateOptions = {} } = {}) {
    if (typeof prompt === "string" && chat && this.tokenizer.hasChatTemplate) prompt = [{ role: "user", content: prompt }];
    if (typeof prompt === "string") return [...this.tokenizer.openingTokens, ...this.tokenizer.encode(prompt)];
    return typeof prompt[0] === "object" ? this.tokenizer.encode(this.tokenizer.chatPrompt(prompt, templateOptions)) : [...prompt];
  }

  // Calls `listener(seconds, bits)` after each token but the first.  Returns a function that ends it.
  listen(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  // A reply, piece by piece: {text, token, bits, seconds, ends}.  It ends at maxTokens, an end token or the end of the
  // context, or when `signal` is aborted.
  // options: maxTokens, chat, templateOptions, temperature (0: the likeliest), topK, topP, minP, seed, fresh (read all
  // of the prompt again), signal.
  async *generate(prompt, options = {}) {
    const { maxTokens = 512, temperature = 0, seed = null, fresh = false, signal } = options;
    checkOptions(options);
    const ids = this.promptIds(prompt, options), { context } = this;
    const room = Math.min(maxTokens, this.contextLength - ids.length);
    if (!ids.length || room < 1) {
      throw new MbqError("usage", ids.length
        ? `the prompt has ${ids.length} tokens, and the context ${this.contextLength}; start a new conversation` : "the prompt is empty");
    }
    if (this.#busy) throw new MbqError("usage", "the engine is already generating; end that reply first");
    this.#busy = true;
    const draw = random(seed ?? Math.floor(Math.random() * 2 ** 32));
    const stream = this.tokenizer.stream();
    try {
      context.rewind(fresh ? 0 : Math.min(context.common(ids), ids.length - 1));
      let start_ms = performance.now();
      for (let at = context.tokens.length; at < ids.length; at += this.promptChunk) {
        if (signal?.aborted) return;
        context.append(ids.slice(at, at + this.promptChunk), this.#budget());
        if (at + this.promptChunk < ids.length) await context.result();  // a page answers between two chunks
      }
      for (let count = 1; count <= room; count++) {
        const result = await context.result();
        const token = temperature < MIN_TEMPERATURE ? result.token : choose(await context.logits(), options, draw);
        const seconds = (performance.now() - start_ms) / 1000, ends = this.endTokens.has(token);
        if (count > 1) for (const listener of this.listeners) listener(seconds, result.bits);
        const last = ends || count === room;
        yield { text: (ends ? "" : stream.add(token)) + (last ? stream.rest() : ""), token, bits: result.bits, seconds, ends };
        if (last || signal?.aborted) return;
        start_ms = performance.now();
        context.append([token], this.#budget());
      }
    } finally {
      this.#busy = false;
    }
  }

  #budget() {
    return allowance(this.bundle.depthBits, this.avgBits, Math.min(Math.max(this.depth, 1), this.limitDepth));
  }

  // Frees the memory of the model.
  close() {
    this.closed = true;
    this.device.destroy();
  }
}

const pause = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
