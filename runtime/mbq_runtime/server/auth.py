"""Who may ask: the key, and for servers without one, the manners a browser can be held to."""

from __future__ import annotations

import hashlib
import hmac
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError

OPEN_PATHS = frozenset({"/", "/health"})  # neither tells anything
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Auth:
    """ASGI middleware.

    With a key, every path but the open ones wants ``Authorization: Bearer KEY``.  Without one, any
    page in a browser on this machine could reach the server: requests that another site's page
    sends are refused, and, when it listens to this machine alone, so are those that call it by
    another name (which a page can make point here).
    """

    def __init__(self, app: ASGIApp, api_key: str | None, host: str) -> None:
        self._app = app
        self._digest = None if api_key is None else _digest(api_key.encode())
        self._local = is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        if self._digest is not None:
            if path not in OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
                raise ApiError(
                    401, "wrong or missing API key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
            return
        host = headers.get("host", "")
        if self._local and not is_loopback(_name(host)):
            raise ApiError(403, f"this server answers to localhost, not to {host!r}; start it with --api-key")
        origin = headers.get("origin")
        if origin is not None and method not in _SAFE_METHODS and origin.partition("://")[2] != host:
            raise ApiError(403, f"a page of {origin} may not ask this server; start it with --api-key")

    def _has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        # Digests are of one length and compared in constant time: neither tells how close a guess was.
        given = _digest(key.strip().encode("latin-1"))
        return hmac.compare_digest(given, self._digest or b"") and scheme.lower() == "bearer"


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine and nothing else."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """Without the port and the brackets of IPv6."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
