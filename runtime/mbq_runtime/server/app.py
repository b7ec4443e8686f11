"""The routes of the server: OpenAI's API, health, metrics and the monitor page."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mbq_runtime.bundle.manifest import Budget

from .auth import Auth, PlainPaths, cors
from .connections import Uploads
from .errors import ApiError
from .metrics import CONTENT_TYPE, Metrics
from .monitor_feed import FeedSampler, MonitorFeed
from .replies import ChatShape, CompletionShape, Reply, Shape, send_events, while_connected
from .requests import Body, ChatBody, CompletionBody, order, parse
from .tools import FORMATS, ToolFormat, find_format, with_calls
from .worker import Worker

if TYPE_CHECKING:
    from mbq_runtime.control.bounds import BoundedEngine
    from mbq_runtime.control.governor import Governor
    from mbq_runtime.engine import Engine

_MIN_BODY_LIMIT = 1 << 20
_BODY_BYTES_PER_TOKEN = 16  # enough for each prompt that fits the context, escapes included
_UPLOAD_S = 30.0
_FAIR_UPLOAD_S = 5.0  # for a large body while others wait
_MOST_WATCHERS = 32
_LAST_WORDS_S = 2.0  # time for unfinished replies when the server stops; then each gets a closing error
_CLOSING_POLL_S = 0.2
_PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
}


class Server:
    """A loaded engine behind HTTP.  ``app`` is the ASGI application.

    Args:
        engine: a loaded engine.
        bounded: the same engine, as the governor controls it.
        governor: gives readings and the reason of the budget.
        feed: the data of the monitor page.
        budget: bits that requests can ask for, within the budget of the bundle.
        queue_limit: number of requests that can wait while one runs.
        cache_bytes: bytes of the contexts that are kept after their reply; 0: none.
        host: address on which the server listens.
        api_key: key that clients must send; None: no key.
        origins: origins whose pages may use the server, such as "https://chat.example"; "*" for every page.
    """

    def __init__(
        self,
        engine: Engine,
        bounded: BoundedEngine,
        governor: Governor,
        feed: MonitorFeed,
        *,
        budget: Budget,
        queue_limit: int,
        cache_bytes: int = 0,
        host: str = "127.0.0.1",
        api_key: str | None = None,
        origins: Sequence[str] = (),
    ) -> None:
        self.model = engine.manifest.model.name
        self.worker = Worker(engine, bounded, governor, queue_limit, cache_bytes)
        self._engine, self._budget, self._feed = engine, budget, feed
        self._sample = FeedSampler(bounded, governor, self.worker)
        self._body_limit = max(_MIN_BODY_LIMIT, engine.context_length * _BODY_BYTES_PER_TOKEN)
        self._uploads = Uploads(_FAIR_UPLOAD_S)
        self._watchers = 0
        self._started_s = int(time.time())
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/live", self._watch),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
        ]
        self.metrics = Metrics(bounded, governor, self.worker, [route.path for route in routes])
        self.worker.on_result = self.metrics.reply
        self.app = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            middleware=[
                Middleware(PlainPaths),
                Middleware(self.metrics.counted),
                *([Middleware(CORSMiddleware, **cors(origins))] if origins else []),
                Middleware(Auth, api_key=api_key, host=host, origins=origins),
            ],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse, Exception: _refuse},
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._feed.keep(self._sample)), asyncio.create_task(self._close_in_time())]
        # A full collection looks at each object of the process, while nothing else runs.  A flood of connections starts
        # many.  What was loaded before stays, so it is left out.
        gc.collect()
        gc.freeze()
        with self.worker:
            try:
                yield
            finally:
                gc.unfreeze()
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _close_in_time(self) -> None:
        """End unfinished replies soon after the server was told to stop.  uvicorn ends the lifespan after them."""
        while not self._feed.closing:
            await asyncio.sleep(_CLOSING_POLL_S)
        await asyncio.sleep(_LAST_WORDS_S)
        self.worker.close()

    async def _page(self, _: Request) -> Response:
        page = files(__package__).joinpath("page.html").read_bytes()
        return Response(page, headers=_PAGE_HEADERS, media_type="text/html; charset=utf-8")

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _watch(self, _: Request) -> Any:
        feed = self._feed

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            self._watchers += 1
            try:
                await while_connected(receive, send_events(send, feed.stream()))
            finally:
                self._watchers -= 1

        if self._watchers >= _MOST_WATCHERS:
            raise ApiError(503, f"{_MOST_WATCHERS} others watch already; close one", code="too_many_watchers")

        return respond

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def _chat(self, request: Request) -> Any:
        if not self._engine.has_chat_template:
            raise ApiError(400, "the model has no chat template; use /v1/completions", code="no_chat_template")
        return await self._reply(request, ChatBody, ChatShape)

    async def _completion(self, request: Request) -> Any:
        return await self._reply(request, CompletionBody, CompletionShape)

    async def _reply(self, request: Request, kind: type[Body], shape: type[Shape]) -> Reply:
        body = parse(kind, await self._read(request))
        self._check_model(body.model)
        made = order(body, self._budget, self._engine.context_length)
        about: dict[str, Any] = {}
        if isinstance(body, ChatBody) and body.offered_tools():
            about["tool_format"] = tool_format = self._tool_format()
            made = with_calls(made, body, tool_format, self._engine.special_id)
        job = self.worker.submit(made)
        return Reply(
            job,
            shape(self.model, self._engine.spell, **about),
            self.worker.cancel,
            stream=bool(body.stream),
            with_usage=body.stream_options is not None and body.stream_options.include_usage,
        )

    def _tool_format(self) -> ToolFormat:
        """How the model writes calls of tools.  Raises ApiError where nobody knows."""
        found = find_format(self._engine.chat_template(tools=True))
        if found is None:
            message = (
                f"tools: how this model writes calls is not known; known are {', '.join(FORMATS)}; leave tools out"
            )
            raise ApiError(400, message, param="tools", code="unsupported")
        return found

    def _card(self) -> dict[str, Any]:
        facts = {"context_length": self._engine.context_length, "min_bits": self._budget.min_bits}
        facts |= {"max_bits": self._budget.max_bits}
        return {"id": self.model, "object": "model", "created": self._started_s, "owned_by": "local", **facts}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            message = f"model {name[:80]!r} is unknown; this server has {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _read(self, request: Request) -> bytes:
        """The request body.  Raises ApiError when it is too large, too slow, or incomplete."""
        too_large = ApiError(413, f"the request body is larger than {self._body_limit} bytes", code="body_too_large")
        length = request.headers.get("content-length", "")
        announced = int(length) if length.isdecimal() else 0
        if announced > self._body_limit:
            raise too_large
        data = bytearray()
        try:
            async with self._uploads.reading(_UPLOAD_S) as upload:
                await self._uploads.grow(upload, announced)
                async for chunk in request.stream():
                    data += chunk
                    await self._uploads.grow(upload, len(data))
                    if len(data) > self._body_limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the request body did not arrive in time (at most {_UPLOAD_S:g} s)") from None
        except ClientDisconnect:
            raise ApiError(400, "the request body was cut off") from None
        return bytes(data)


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404:
        served = ", ".join(dict.fromkeys(route.path for route in request.app.routes))
        error = ApiError(404, f"nothing is served at {request.url.path[:80]!r}; served are {served}", code="not_found")
    if isinstance(error, HTTPException):  # no such method
        error = ApiError(error.status_code, error.detail, headers=error.headers)
    if not isinstance(error, ApiError):  # the server logs it
        error = ApiError(500, "the server failed; its log has the reason", code="internal_error")
    return error.response()
