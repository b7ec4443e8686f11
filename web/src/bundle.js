// A bundle on a server: its manifest, its small files, and its weights in the order in which depths need them.
// Each file and each chunk is compared with its SHA-256.  docs/bundle-format.md describes all of it.

import { MbqError } from "./errors.js";
import { Source } from "./source.js";

export const CHUNK_BYTES = 4 << 20;
const PLAN = "gpu/plan.json", WEIGHTS = "gpu/weights.bin";
const FORMAT = "mbq-bundle", FORMAT_VERSION = 3, ENGINE = "webgpu";
const TIMES = 3;  // a damaged download is tried so many times

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, byte => byte.toString(16).padStart(2, "0")).join("");
}

export class Bundle {
  // url: the bundle's folder.  store: see store.js.  options: headers, and depth of a trimmed bundle.
  static async open(url, store, { headers = {}, depth = null } = {}) {
    const bundle = new Bundle(new URL(url.endsWith("/") ? url : `${url}/`, globalThis.location?.href).href, store, headers);
    await bundle.#readManifest(depth);
    return bundle;
  }

  constructor(url, store, headers) {
    this.url = url;
    this.store = store;
    this.headers = headers;
  }

  async #readManifest(depth) {
    const key = `manifest/${encodeURIComponent(this.url)}`;
    let bytes, kept = false;
    try {
      bytes = await new Source(this.url, "manifest.json", this.headers).whole("no-cache");
    } catch (error) {
      kept = true;
      bytes = await this.store.get(key);  // without its server
      if (bytes === null) throw error;
    }
    const manifest = this.manifest = this.#json("manifest.json", bytes);
    if (manifest.format !== FORMAT || manifest.format_version !== FORMAT_VERSION) {
      throw new MbqError("broken", `${this.url}: it is ${manifest.format} ${manifest.format_version}, needed ${FORMAT} ` +
        `${FORMAT_VERSION}; export the bundle again`);
    }
    if (!(manifest.engines || []).includes(ENGINE)) {
      throw new MbqError("usage", `${this.url}: the bundle is for ${(manifest.engines || []).join(", ")}, a browser needs ` +
        `${ENGINE}; export it with --target ${ENGINE}`);
    }
    // Not before: a network that wants a login first answers with a page of its own.
    if (!kept) await this.store.put(key, bytes);
    this.entries = new Map(manifest.files.map(entry => [entry.name, entry]));
    let bits = 0;
    this.depthBits = manifest.slices.map(width => bits += width);
    this.deepest = depth ?? this.depthBits.length;
    this.parts = manifest.parts.slice(0, manifest.parts.length > 1 ? this.deepest : 1);
  }

  #json(name, bytes) {
    try {
      return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    } catch (error) {
      throw new MbqError("broken", `${this.url}${name}: no JSON (${error.message}); copy the bundle again`);
    }
  }

  // A small file as bytes; null for one that the bundle does not have.
  async file(name) {
    const entry = this.entries.get(name);
    if (!entry) return null;
    const source = new Source(this.url, name, this.headers);
    return this.#checked(name, entry.sha256, time => source.whole(time > 1 ? "reload" : "default"));
  }

  async json(name) {
    const bytes = await this.file(name);
    return bytes && this.#json(name, bytes);
  }

  async text(name) {
    const bytes = await this.file(name);
    return bytes && new TextDecoder().decode(bytes);
  }

  plan() {
    return this.json(PLAN);
  }

  kernel(file) {
    return this.text(`gpu/${file}`);
  }

  // Bytes from the store or from `fetch`, once they have the hash.
  async #checked(name, hash, fetch) {
    const kept = await this.store.get(`sha256/${hash}`);
    if (kept !== null) {
      if (await sha256(kept) === hash) return kept;
      await this.store.drop(`sha256/${hash}`);
    }
    for (let time = 1; ; time++) {
      const bytes = await fetch(time);
      const found = await sha256(bytes);
      if (found === hash) {
        await this.store.put(`sha256/${hash}`, bytes);
        return bytes;
      }
      if (time === TIMES) {
        throw new MbqError("broken", `${this.url}${name}: its SHA-256 is ${found.slice(0, 12)}…, needed ${hash.slice(0, 12)}… ` +
          "as in the manifest; the file on the server is damaged: copy the bundle again");
      }
    }
  }

  // [{begin, end, sha256, depth}] of the weights, in order; depth: the one that is whole after this chunk, or 0.
  chunks() {
    const entry = this.entries.get(WEIGHTS), found = [];
    for (const [index, part] of this.parts.entries()) {
      const end = Math.max(0, ...part.filter(range => range.name === WEIGHTS).map(range => range.end));
      for (let begin = found.length * CHUNK_BYTES; begin < end; begin = found.length * CHUNK_BYTES) {
        const hash = entry.chunks?.length ? entry.chunks[found.length] : entry.sha256;
        found.push({ begin, end: Math.min(begin + CHUNK_BYTES, entry.size), sha256: hash, depth: 0 });
      }
      if (found.length) found[found.length - 1].depth = index + 1;
    }
    if (this.parts.length === 1 && found.length) found[found.length - 1].depth = this.deepest;
    return found;
  }

  // Bytes to load before the first word and in all, and whether all of it is kept already.
  async sizes() {
    const small = [...this.entries.values()].filter(entry => entry.name !== WEIGHTS).reduce((sum, e) => sum + e.size, 0);
    const chunks = this.chunks(), first = chunks.findIndex(chunk => chunk.depth);
    const kept = await Promise.all(chunks.map(chunk => this.store.has(`sha256/${chunk.sha256}`)));
    const sum = list => list.reduce((total, chunk) => total + chunk.end - chunk.begin, 0);
    return {
      startBytes: small + sum(chunks.slice(0, first + 1)),
      totalBytes: small + sum(chunks),
      kept: kept.every(Boolean),
    };
  }

  // The chunks of the weights from one on, each with its bytes.
  async *weights(from = 0) {
    const chunks = this.chunks();
    const source = new Source(this.url, WEIGHTS, this.headers);
    for (const [index, chunk] of chunks.entries()) {
      if (index < from) continue;
      const bytes = await this.#checked(WEIGHTS, chunk.sha256, time => {
        // One request fetches what follows up to the end of the depth.
        const last = chunks.slice(index).find(next => next.depth) || chunk;
        if (time > 1) source.close();
        return source.read(chunk.begin, chunk.end, last.end, time > 1);
      });
      yield { index, count: chunks.length, bytes, ...chunk };
    }
  }
}
