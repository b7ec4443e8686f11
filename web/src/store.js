// The browser's cache of files, by their SHA-256, so that a page works without its server after the first load.
// Two bundles that share a chunk share its copy.

const NAME = "mbq-bundles";
const place = key => new URL(`/.mbq/${key}`, globalThis.location.href).href;

export class Store {
  // null where the browser has no cache: over plain http, or in a private window.
  static async open() {
    try {
      return new Store(await caches.open(NAME));
    } catch {
      return new Store(null);
    }
  }

  constructor(cache) {
    this.cache = cache;
    this.full = cache === null;
  }

  // The bytes under a key, or null.
  async get(key) {
    try {
      const found = this.cache && await this.cache.match(place(key));
      return found ? new Uint8Array(await found.arrayBuffer()) : null;
    } catch {
      return null;
    }
  }

  async has(key) {
    try {
      return Boolean(this.cache && await this.cache.match(place(key)));
    } catch {
      return false;
    }
  }

  // A full disk is no error: the page runs, and loads the bytes again the next time.
  async put(key, bytes) {
    if (this.full) return;
    try {
      await this.cache.put(place(key), new Response(bytes));
    } catch {
      this.full = true;
    }
  }

  async drop(key) {
    if (this.cache) await this.cache.delete(place(key)).catch(() => false);
  }
}
