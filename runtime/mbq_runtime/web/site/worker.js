// The service worker: keeps the page itself, so that it opens without a server.  The bundle is kept by the engine.

const NAME = "mbq-page-5e3d0a61bfe358cb", FILES = ["./","app.webmanifest","icon.svg","licenses.txt","mbq.js","page.css","page.js","app.json"];

self.addEventListener("install", event => {
  event.waitUntil(caches.open(NAME).then(cache => cache.addAll(FILES)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", event => {
  const old = names => names.filter(name => name.startsWith("mbq-page-") && name !== NAME);
  event.waitUntil(caches.keys().then(names => Promise.all(old(names).map(name => caches.delete(name))))
    .then(() => self.clients.claim()));
});

// The newest page where the server answers, else the kept one.
self.addEventListener("fetch", event => {
  const { request } = event, url = new URL(request.url), folder = new URL("./", self.location);
  const name = url.href.slice(folder.href.length).split(/[?#]/)[0];
  if (request.method !== "GET" || !url.href.startsWith(folder.href) || !FILES.includes(name || "./")) return;
  event.respondWith(fetch(request).then(answer => answer.ok ? answer : Promise.reject(answer))
    .catch(async () => await caches.match(name || "./", { cacheName: NAME }) ?? Response.error()));
});
