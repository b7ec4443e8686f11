"""How the server meets the network: uvicorn, told only what differs from its defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_PARTING_S = 3  # for replies in the making when the server is told to stop
# Longer than clients keep an idle connection (5 s in OpenAI's): the server must not be the one to close
# it, or a request already on its way is lost.
_KEEP_ALIVE_S = 75


def configure(app: ASGIApp) -> uvicorn.Config:
    """For a server that is given its sockets."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_PARTING_S,
    )
