"""The settings of uvicorn that differ from its defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvicorn

from .connections import BoundedProtocol, accepted_at_once

if TYPE_CHECKING:
    from starlette.types import ASGIApp

# Time for unfinished replies when the server stops.  ``Server`` ends them earlier; a pass of the engine can be slow.
_PARTING_S = 10
# Longer than clients keep an idle connection (OpenAI's: 5 s).  If the server closes it first, a request that is on its
# way is lost.
_KEEP_ALIVE_S = 75


def configure(app: ASGIApp) -> uvicorn.Config:
    """Settings of a server that gets its sockets, each a ``Listener``, from the caller.

    Args:
        app: the ASGI application.
    """
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=BoundedProtocol,
        backlog=accepted_at_once(),
        ws="none",
        lifespan="on",
        log_level="error",  # any client could fill the log with warnings
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_PARTING_S,
    )
