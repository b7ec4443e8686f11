"""The device of the page's engine as a device of ``mbq_runtime.engine.gpu``: kernels run in the browser."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.gpu_plan import Kernel, Launch

_START = """async () => {
  const { Device } = await import("/mbq.js");
  globalThis.device = await Device.open();
  globalThis.held = [];
  globalThis.bytesOf = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
}"""
_READ = """async ([buffer, size]) => {
  const bytes = new Uint8Array(await device.read(held[buffer], size));
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}"""


class BrowserDevice:
    """See ``mbq_runtime.engine.gpu.Device``.  Buffers and programs are numbers.

    Args:
        page: a page of a site with the engine.
    """

    def __init__(self, page: Any) -> None:
        self._page = page
        page.evaluate(_START)

    def compile(self, kernels: Mapping[str, Kernel], texts: Mapping[str, str], where: Path) -> None:
        self._page.evaluate("([kernels, texts]) => device.compile(kernels, texts)", [{k: {} for k in kernels}, texts])

    def buffer(self, size: int) -> int:
        found: int = self._page.evaluate("size => held.push(device.buffer(size)) - 1", -(-size // 4) * 4)
        return found

    def write(self, buffer: int, content: NDArray[Any]) -> None:
        data = content.tobytes()
        text = base64.b64encode(data + bytes(-len(data) % 4)).decode()
        self._page.evaluate("([buffer, text]) => device.write(held[buffer], bytesOf(text))", [buffer, text])

    def prepare(self, launches: Sequence[Launch], kernels: Mapping[str, Kernel], buffers: Mapping[str, int]) -> int:
        given = [{"kernel": one.kernel, "grid": list(one.grid), "buffers": list(one.buffers)} for one in launches]
        script = """([launches, buffers]) => {
          const named = Object.fromEntries(Object.entries(buffers).map(([name, index]) => [name, held[index]]));
          return held.push(device.prepare(launches, named)) - 1;
        }"""
        found: int = self._page.evaluate(script, [given, dict(buffers)])
        return found

    def run(self, prepared: int) -> None:
        self._page.evaluate("program => device.run(held[program])", prepared)

    def read(self, buffer: int, content: NDArray[Any]) -> None:
        found = base64.b64decode(self._page.evaluate(_READ, [buffer, -(-content.nbytes // 4) * 4]))
        content.reshape(-1)[:] = np.frombuffer(found[: content.nbytes], content.dtype)
