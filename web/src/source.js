// Reads one file of a server: whole, or range by range from one open answer.  A server without ranges sends all of the
// file; then what lies before a range is skipped.

import { MbqError } from "./errors.js";

export class Source {
  constructor(folder, name, headers) {
    this.url = new URL(name, folder).href;
    this.headers = headers;
    this.reader = null;
    this.at = 0;
    this.ranged = false;  // whether the open answer is a range, and not the whole file
    this.rest = null;  // bytes that were received and not given
  }

  // cache: how far the browser's own cache may answer, as `fetch` takes it.
  async #open(headers, cache) {
    let answer;
    try {
      answer = await fetch(this.url, { headers: { ...this.headers, ...headers }, cache });
    } catch {
      throw new MbqError("network", `${this.url}: the server does not answer`);
    }
    if (answer.status === 401) throw new MbqError("key", `${this.url}: the server needs its API key`);
    if (!answer.ok) throw new MbqError("network", `${this.url}: the server says ${answer.status}`);
    return answer;
  }

  async whole(cache = "default") {
    const answer = await this.#open({}, cache);
    try {
      return new Uint8Array(await answer.arrayBuffer());
    } catch {
      throw new MbqError("network", `${this.url}: the connection broke off`);
    }
  }

  // Bytes begin to end.  until: how far the next reads will go.  fresh: not from the browser's own cache.
  async read(begin, end, until, fresh = false) {
    const opens = this.reader === null || this.at > begin || (this.ranged && this.at < begin);
    if (opens) {
      this.close();
      const answer = await this.#open({ Range: `bytes=${begin}-${until - 1}` }, fresh ? "reload" : "default");
      const range = /^bytes (\d+)-/.exec(answer.headers.get("Content-Range") || "");
      this.ranged = answer.status === 206 && range !== null;
      this.at = this.ranged ? Number(range[1]) : 0;
      this.reader = answer.body.getReader();
    }
    const found = new Uint8Array(end - begin);
    let filled = 0;
    while (filled < found.length) {
      const block = this.rest ?? await this.#block();
      if (block === null) {
        this.reader = null;
        if (opens || filled) throw new MbqError("network", `${this.url}: the connection broke off`);
        return this.read(begin, end, until, fresh);  // the last range ended here
      }
      const skip = Math.min(Math.max(begin + filled - this.at, 0), block.length);
      const taken = block.subarray(skip, skip + found.length - filled);
      found.set(taken, filled);
      filled += taken.length;
      this.at += skip + taken.length;
      this.rest = skip + taken.length < block.length ? block.subarray(skip + taken.length) : null;
    }
    return found;
  }

  close() {
    this.reader?.cancel().catch(() => {});
    this.reader = this.rest = null;
  }

  async #block() {
    try {
      const { done, value } = await this.reader.read();
      return done ? null : value;
    } catch {
      this.reader = null;
      throw new MbqError("network", `${this.url}: the connection broke off`);
    }
  }
}
