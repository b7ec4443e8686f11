"""The routes of the server: the APIs of OpenAI and Anthropic, health, metrics and the monitor page."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mbq_runtime.errors import MbqError
from mbq_runtime.web import ENGINE as WEB_ENGINE

from . import messages, responses
from .app_page import AppPage
from .auth import Auth, PlainPaths, cors
from .completions import ChatShape, CompletionShape
from .connections import Uploads
from .divide import Divider
from .errors import ApiError
from .metrics import CONTENT_TYPE, Metrics
from .models import Model, Models
from .monitor_feed import FeedSampler, MonitorFeed
from .replies import Reply, Shape, send_events, while_connected
from .requests import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, order, parse
from .tool_format import ToolFormat, named
from .tools import FORMATS, find_format, with_calls
from .worker import Worker

if TYPE_CHECKING:
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
    """Models behind HTTP.  ``app`` is the ASGI application.

    Args:
        models: the models, each with its engine.
        feed: the data of the monitor page.
        queue_limit: number of requests that can wait while one runs.
        cache_bytes: bytes of the contexts that are kept after their reply; 0: none.
        host: address on which the server listens.
        api_key: key that clients must send; None: no key.
        origins: origins whose pages may use the server, such as "https://chat.example"; "*" for every page.
        any_model: whether requests may name any model; the first answers those of unknown names.
        sleep_s: seconds without a request after which the memory of the models is freed; None: never.
        app: folder of a bundle for WebGPU, which browsers run at /app; None: the first model's, if it is one.

    Raises:
        UsageError: ``app`` has no kernels for WebGPU.
    """

    def __init__(
        self,
        models: Models,
        feed: MonitorFeed,
        *,
        queue_limit: int,
        cache_bytes: int = 0,
        host: str = "127.0.0.1",
        api_key: str | None = None,
        origins: Sequence[str] = (),
        any_model: bool = False,
        sleep_s: float | None = None,
        app: Path | None = None,
    ) -> None:
        self.worker = Worker(models, limit=queue_limit, cache_bytes=cache_bytes, sleep_s=sleep_s)
        self._models, self._feed = models, feed
        self._sample = FeedSampler(models, self.worker)
        longest = max(model.engine.context_length for model in models)
        self._body_limit = max(_MIN_BODY_LIMIT, longest * _BODY_BYTES_PER_TOKEN)
        self._uploads = Uploads(_FAIR_UPLOAD_S)
        self._watchers, self._any_model = 0, any_model
        self._started_s = int(time.time())
        if app is None and WEB_ENGINE in models.first.engine.manifest.engines:
            app = models.first.engine.path
        app_page = AppPage(app)
        routes = [
            Route("/", self._page),
            Route("/app", app_page.respond),
            Route("/app/{name:path}", app_page.respond),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/live", self._watch),
            Route("/v1/models", self._all_models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/responses", self._respond, methods=["POST"]),
            Route("/v1/messages", self._message, methods=["POST"]),
            Route("/v1/messages/count_tokens", self._count, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
        ]
        self.metrics = Metrics(models, self.worker, [route.path for route in routes])
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
        return JSONResponse({"status": "ok", "ceiling_bits": self._models.bounded.ceiling_bits})

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

    async def _all_models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(model) for model in self._models]})

    async def _one_model(self, request: Request) -> Response:
        return JSONResponse(self._card(self._model(request.path_params["name"])))

    async def _chat(self, request: Request) -> Any:
        body = parse(ChatBody, await self._read(request))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        model = self._model(body.model)
        shape = partial(ChatShape, body.model or model.name, model.engine.spell, model.engine.reasoning_marks)
        return self._reply(model, body, lambda form: shape(form, with_usage=with_usage))

    async def _completion(self, request: Request) -> Any:
        body = parse(CompletionBody, await self._read(request))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        model = self._model(body.model)
        shape = CompletionShape(
            body.model or model.name, model.engine.spell, with_usage=with_usage, has_text=model.engine.has_text
        )
        return self._reply(model, body, lambda form: shape)

    async def _respond(self, request: Request) -> Any:
        data = _object(await self._read(request))
        body = _chat_body(responses.as_chat(data))
        model = self._model(body.model)
        name = body.model or model.name
        return self._reply(model, body, lambda form: responses.ResponseShape(name, _divider(model, form), data))

    async def _message(self, request: Request) -> Any:
        data = _object(await self._read(request))
        body = _chat_body(messages.as_chat(data))
        if body.max_tokens is None:
            raise ApiError(400, "max_tokens: field required", param="max_tokens", code="missing")
        model = self._model(body.model)
        name = body.model or model.name
        return self._reply(
            model, body, lambda form: messages.MessageShape(name, _divider(model, form), body.stop or ())
        )

    async def _count(self, request: Request) -> Response:
        body = _chat_body(messages.as_chat(_object(await self._read(request))))
        engine = self._model(body.model).engine
        tokens = await _tokens(engine, body.conversation(), template_kwargs=body.template_kwargs())
        return JSONResponse({"input_tokens": len(tokens)})

    async def _tokenize(self, request: Request) -> Response:
        body = parse(TokenizeBody, await self._read(request))
        engine = self._model(body.model).engine
        if body.messages is not None:
            tokens = await _tokens(engine, [message.for_template() for message in body.messages])
        else:
            text = body.content if body.content is not None else body.prompt or ""
            tokens = await _tokens(engine, text, add_bos=body.add_special or bool(body.add_special_tokens))
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": engine.context_length})

    async def _detokenize(self, request: Request) -> Response:
        body = parse(DetokenizeBody, await self._read(request))
        engine = self._model(body.model).engine
        if len(body.tokens) > engine.context_length:
            message = f"tokens: {len(body.tokens)} ids; needed {engine.context_length} or fewer, the model's context"
            raise ApiError(400, message, param="tokens", code="invalid_prompt")
        try:
            text = await asyncio.to_thread(engine.decode, body.tokens)
        except MbqError as error:
            raise ApiError(400, str(error), param="tokens", code="invalid_prompt") from None
        return JSONResponse({"content": text, "prompt": text})

    async def _embeddings(self, _: Request) -> Response:
        message = f"{self._models.first.name} writes text and gives no embeddings; use a model that was made for them"
        raise ApiError(400, message, code="unsupported")

    def _reply(self, model: Model, body: Body, shape: Callable[[ToolFormat | None], Shape]) -> Reply:
        """Queue a request.  shape: makes its format, given how calls of tools are written."""
        engine, tool_format = model.engine, None
        made = order(body, model.budget, engine.context_length)
        if isinstance(body, ChatBody):
            if not engine.has_chat_template:
                raise ApiError(400, "the model has no chat template; use /v1/completions", code="no_chat_template")
            if (marks := engine.reasoning_marks) is not None:
                made = replace(made, options={**made.options, "shown": [marks.opens, marks.closes]})
            if body.offered_tools():
                tool_format = _tool_format(engine, body.continued())
            if tool_format is not None:
                tool_format = tool_format._replace(tools=named(body.callable_tools()))
                made = with_calls(made, body, tool_format, engine.special_id)
        job = self.worker.submit(model, made)
        return Reply(job, shape(tool_format), self.worker.cancel, stream=bool(body.stream))

    def _card(self, model: Model) -> dict[str, Any]:
        facts = {"context_length": model.engine.context_length, "min_bits": model.budget.min_bits}
        facts |= {"max_bits": model.budget.max_bits}
        return {"id": model.name, "object": "model", "created": self._started_s, "owned_by": "local", **facts}

    def _model(self, name: str | None) -> Model:
        """The model that a client names.  Raises ApiError where there is none."""
        found = self._models.first if name is None else self._models.find(name)
        if found is None and not self._any_model:
            known = ", ".join(repr(model.name) for model in self._models)
            message = f"model {str(name)[:80]!r} is unknown; this server has {known} (--any-model accepts each name)"
            raise ApiError(404, message, param="model", code="model_not_found")
        return found or self._models.first

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


async def _tokens(
    engine: Engine, prompt: str | list[dict[str, Any]], *, add_bos: bool = False, template_kwargs: Any = None
) -> list[int]:
    """The ids of a text or a conversation.  A template takes time, so a thread renders it."""
    try:
        if isinstance(prompt, list):
            prompt = await asyncio.to_thread(engine.chat_prompt, prompt, template_kwargs)
        return await asyncio.to_thread(engine.encode, prompt, add_bos=add_bos)
    except MbqError as error:
        raise ApiError(400, str(error).removeprefix(f"{engine.path}: "), code="invalid_prompt") from None


def _divider(model: Model, tool_format: ToolFormat | None) -> Divider:
    return Divider(model.engine.reasoning_marks, tool_format)


def _tool_format(engine: Engine, continued: str | None) -> ToolFormat | None:
    """How the model writes calls of tools; None where the reply can have none.  Raises ApiError where nobody knows.

    continued: text that the reply continues.
    """
    found = find_format(engine.chat_template(tools=True))
    if found is None:
        message = f"tools: how this model writes calls is not known; known are {', '.join(FORMATS)}; leave tools out"
        raise ApiError(400, message, param="tools", code="unsupported")
    if continued is None:
        return found
    closed_at = continued.rfind(found.closes) if found.closes else -1
    if found.opens and continued.rfind(found.opens) > closed_at:
        message = f"the last message, of the role assistant, ends in a begun call ({found.opens}); no call is continued"
        raise ApiError(400, message, param="messages", code="unsupported")
    return found if found.opens else None  # without a mark, a call is the whole of a message


def _object(data: bytes) -> dict[str, Any]:
    """The body as a JSON object."""
    try:
        found = json.loads(data)
        # Replies repeat parts of it.  Python takes NaN, numbers without end and half characters; JSON has none.
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the request body: has half a character; remove it", code="json_invalid") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, "the request body: needed a JSON object, without NaN and Infinity", code="json_invalid")
    return found


def _chat_body(chat: dict[str, Any]) -> ChatBody:
    """The body of a translated request."""
    try:
        return parse(ChatBody, json.dumps(chat).encode())
    except RecursionError:
        raise ApiError(400, "the request body: too many levels", code="json_invalid") from None


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404:
        served = ", ".join(dict.fromkeys(route.path for route in request.app.routes))
        error = ApiError(404, f"nothing is served at {request.url.path[:80]!r}; served are {served}", code="not_found")
    if isinstance(error, HTTPException):  # no such method
        error = ApiError(error.status_code, error.detail, headers=error.headers)
    if not isinstance(error, ApiError):  # the server logs it
        error = ApiError(500, "the server failed; its log has the reason", code="internal_error")
    return error.response()
