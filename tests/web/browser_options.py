"""How Chromium starts for tests: WebGPU on a driver for the processor, the pressure that is set, and no other host.

Chromium shifts the limits of pressure at random after two to four minutes, so that no page knows a device by them.
Here it does not.
"""

from __future__ import annotations

OPTIONS = [
    "--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--use-angle=swiftshader",
    "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-features=ComputePressureBreakCalibrationMitigation",
]  # fmt: skip
