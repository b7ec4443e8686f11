// Makes what the wheel carries from the sources here:  node web/build.mjs [FOLDER]
// Without FOLDER it goes to runtime/mbq_runtime/web/site.  The same sources give the same bytes.

import { createHash } from "node:crypto";
import { copyFile, mkdir, readFile, readdir, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const output = process.argv[2] ?? join(here, "../runtime/mbq_runtime/web/site");
const options = { bundle: true, minify: true, format: "esm", target: "es2022", charset: "utf8", legalComments: "none" };

await rm(output, { recursive: true, force: true });
await mkdir(output, { recursive: true });
await build({ ...options, entryPoints: [join(here, "src/index.js")], outfile: join(output, "mbq.js") });
await build({
  ...options, entryPoints: [join(here, "page/page.js")], outfile: join(output, "page.js"), external: ["./mbq.js"],
});
for (const name of ["index.html", "page.css", "icon.svg", "app.webmanifest"]) {
  await copyFile(join(here, "page", name), join(output, name));
}
// mbq.js holds the code of these packages, and their licences ask for this text beside it.
const { dependencies } = JSON.parse(await readFile(join(here, "package.json"), "utf8"));
const licences = await Promise.all(Object.entries(dependencies).map(async ([name, version]) =>
  `${name} ${version}\n\n${(await readFile(join(here, "node_modules", name, "LICENSE"), "utf8")).trim()}\n`));
await writeFile(join(output, "licenses.txt"), licences.join(`\n${"-".repeat(80)}\n\n`));
// The service worker keeps these files under a name that changes with any of them.
const shell = (await readdir(output)).sort(), hash = createHash("sha256");
for (const name of shell) hash.update(await readFile(join(output, name)));
const worker = await readFile(join(here, "page/worker.js"), "utf8");
await writeFile(join(output, "worker.js"), worker
  .replace("SHELL_NAME", JSON.stringify(`mbq-page-${hash.digest("hex").slice(0, 16)}`))
  .replace("SHELL_FILES", JSON.stringify(["./", ...shell.filter(name => name !== "index.html"), "app.json"])));
