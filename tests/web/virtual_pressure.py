"""The state that Compute Pressure tells a page, set by the DevTools protocol."""

from __future__ import annotations

from typing import Any


class VirtualPressure:
    """Takes the place of the processor's pressure for one page.

    Every two to four minutes Chromium shifts the limits of the states, so that no page knows a device by them.  Then it
    tells a page ``fair`` for ``nominal``, and ``critical`` for ``serious``.

    Args:
        page: a page of Chromium that has loaded nothing yet.
    """

    def __init__(self, page: Any) -> None:
        self._devtools = page.context.new_cdp_session(page)
        source = {"source": "cpu", "enabled": True, "metadata": {"available": True}}
        self._devtools.send("Emulation.setPressureSourceOverrideEnabled", source)

    def set(self, state: str) -> None:
        """Tell the page a state: "nominal", "fair", "serious" or "critical"."""
        self._devtools.send("Emulation.setPressureStateOverride", {"source": "cpu", "state": state})
