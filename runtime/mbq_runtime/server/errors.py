"""Errors in the format of OpenAI's API, with the field that Anthropic's has besides.

{"type": "error", "error": {"message", "type", "param", "code"}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that the client gets.

    Args:
        status: HTTP status.
        message: text for people.
        param: name of the field that causes it; None: no field.
        code: word for programs; None: no word.
        headers: additional HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """The JSON object of the error."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"type": "error", "error": about}

    def response(self) -> JSONResponse:
        """The HTTP response of the error."""
        return JSONResponse(self.body(), self.status, self.headers)
