"""Access checks: the API key, or without a key, checks of the Host and Origin headers that browsers send."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mbq_runtime.addresses import is_loopback

from .app_page import OPEN_PATHS as APP_PATHS
from .errors import ApiError

OPEN_PATHS = frozenset({"/", "/health"}) | APP_PATHS  # none gives any information
_SPACES = " \t"  # of HTTP: other spaces of Unicode are bytes of letters here
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Auth:
    """ASGI middleware that refuses requests without access.

    With a key, each path except the open ones needs ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY``.

    Without a key, each page in a browser on this machine could reach the server.  Therefore requests from pages of
    other sites are refused.  When the server listens only to this machine, requests with another host name are refused
    too, because a page can make such a name point to this machine.

    Args:
        app: the application behind it.
        api_key: the key, without the spaces around it, which no header can have; None: no key.
        host: address on which the server listens.
        origins: origins whose pages may use the server without a key; "*" for every page.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, host: str, origins: Sequence[str] = ()) -> None:
        self._origins = frozenset(origins)
        self._app = app
        self._digest = None if api_key is None else _digest(api_key.strip(_SPACES).encode())
        self._local = is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it to the application.

        Args:
            scope: the request, as in ASGI.
            receive: gives the messages of the client.
            send: sends messages to the client.
        """
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        origin = headers.get("origin")
        if method == "OPTIONS" and origin is not None:  # allowed origins are answered before this
            raise _foreign(origin)
        if self._digest is not None:
            given = headers.get("authorization", "") or f"Bearer {headers.get('x-api-key', '')}"
            if path not in OPEN_PATHS and not self._has_key(given):
                raise ApiError(
                    401, "wrong or missing API key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
            return
        host = headers.get("host", "")
        if self._local and not is_loopback(_name(host)):
            raise ApiError(
                403, f"this server answers requests for localhost, not for {host!r}; start it with --api-key"
            )
        if origin is None or method in _SAFE_METHODS or self._origins & {origin, "*"}:
            return
        if origin.partition("://")[2] != host:
            raise _foreign(origin)

    def _has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        # Digests have one length and are compared in constant time, so the time does not show how close a guess is.
        given = _digest(key.strip(_SPACES).encode("latin-1"))
        return hmac.compare_digest(given, self._digest or b"") and scheme.lower() == "bearer"


def _foreign(origin: str) -> ApiError:
    return ApiError(
        403, f"a page of {origin[:80]} must not use this server; start it with --allow-origin {origin[:80]}"
    )


class PlainPaths:
    """ASGI middleware that merges slashes in paths, and removes the last one: /v1//models/ is /v1/models.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on.

        Args:
            scope: the request, as in ASGI.
            receive: gives the messages of the client.
            send: sends messages to the client.
        """
        if scope["type"] == "http":
            scope = {**scope, "path": "/" + "/".join(filter(None, scope["path"].split("/")))}
        await self._app(scope, receive, send)


def cors(origins: Sequence[str]) -> dict[str, Any]:
    """Arguments of Starlette's CORSMiddleware, which answers the preflight of browsers before the key is checked.

    Args:
        origins: see ``Auth``.
    """
    return {"allow_origins": list(origins), "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}


def _name(host: str) -> str:
    """The host without its port, and without the brackets of IPv6."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
