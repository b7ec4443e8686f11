"""The engine that talks: a bundle on onnxruntime-genai."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.manifest import OPS_LIBRARY, Manifest

from .generation import Generation, Record, Sampling, Step, Tell
from .opening import engine_errors, import_engine, open_bundle
from .score import mean_nll

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation: [{"role": "user", "content": "..."}, ...]."""

_BUSY = "this engine is already generating; read that reply to its end, close() it, or load a second engine"


class Score(NamedTuple):
    """nll: mean negative log-likelihood in nats of tokens 1.. given those before; avg_bits_used: mean over tokens."""

    nll: float
    avg_bits_used: float


class Passes(NamedTuple):
    """seconds: of each pass; avg_bits_used: mean over all tokens."""

    seconds: tuple[float, ...]
    avg_bits_used: float


class Engine:
    """A loaded bundle.  Make one with ``Engine.load``; use ``avg_bits`` and ``generate``.

    One reply runs at a time.  ``avg_bits`` may be set from any thread at any time.
    on_token: somebody to tell the seconds and bits of each decoded token, see ``Tell``.
    """

    on_token: Tell | None = None

    def __init__(self, path: Path, manifest: Manifest, threads: int | None, context: int | None) -> None:
        og = import_engine("onnxruntime_genai")
        self.path, self.manifest = path, manifest
        config = _read_config(path, manifest)
        # The engine prints its own copy of every error it also throws; one is enough.
        session: dict[str, int] = {"log_severity_level": 4}
        if threads is not None:
            session["intra_op_num_threads"] = threads
        with engine_errors(f"{path}: the engine cannot load it"):
            overlaid = og.Config(str(path))
            overlaid.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            self._model = og.Model(overlaid)
            self._tokenizer = og.Tokenizer(self._model)
            self._bos = _leading_token(self._tokenizer)
        self._og = og
        self._context = int(config["model"]["context_length"])
        if context is not None:
            if not 2 <= context <= self._context:
                raise UsageError(f"context {context}: {path} takes 2 to {self._context} tokens")
            self._context = context
        self._eos = frozenset(_ids(config["model"]["eos_token_id"]))
        self._chunk = int(config["search"]["chunk_size"])
        # The native generator keeps a pointer to this array and reads it in every pass: a new budget
        # is one float written, and nothing else.
        self._budget = np.array([manifest.budget.default_bits], np.float32)
        self._busy = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        avg_bits: float | None = None,
        context: int | None = None,
    ) -> Engine:
        """Load the bundle in folder ``path``.

        threads: of the processor, None for one per core; avg_bits: the first budget, None for the
        bundle's default; context: most tokens of prompt and reply together, which take memory, None
        for all the bundle can.  Raises BundleError when it is incomplete or not for this machine,
        UsageError for a bad argument.
        """
        folder, manifest = open_bundle(path, threads)
        if avg_bits is not None:
            manifest.budget.check(avg_bits, str(path))
        engine = cls(folder, manifest, threads, context)
        if avg_bits is not None:
            engine.avg_bits = avg_bits
        return engine

    @property
    def avg_bits(self) -> float:
        """The budget: average bits per weight a token may use.  Setting it takes effect at the next token.

        Raises UsageError for a value outside the bundle's range.
        """
        return float(self._budget[0])

    @avg_bits.setter
    def avg_bits(self, value: float) -> None:
        self._budget[0] = self.manifest.budget.check(value, str(self.path))

    @property
    def context_length(self) -> int:
        """Tokens of prompt and reply together."""
        return self._context

    @property
    def has_chat_template(self) -> bool:
        if (self.path / "chat_template.jinja").is_file():
            return True
        config = self.path / "tokenizer_config.json"
        return config.is_file() and "chat_template" in json.loads(config.read_bytes())

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Token ids of ``text``; with ``add_bos``, after the model's opening token if its tokenizer has one.

        Raises UsageError for a text with a NUL character, at which the tokenizer would stop reading.
        """
        _check_text(text)
        with engine_errors(f"{self.path}: the tokenizer failed"):
            ids = [int(token) for token in self._tokenizer.encode(text)]
        return [*self.opening_tokens, *ids] if add_bos else ids

    @property
    def opening_tokens(self) -> list[int]:
        """What the tokenizer puts before every text: [bos] or nothing."""
        return [] if self._bos is None else [self._bos]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The bundle's own rendering of a conversation, ready for the reply.  Raises BundleError when it has none."""
        if not self.has_chat_template:
            raise BundleError(f"{self.path}: the bundle has no chat template; pass the text with chat=False")
        for message in messages:
            _check_text(message.get("content", ""))
        with engine_errors(f"{self.path}: chat_template.jinja cannot be rendered"):
            text: str = self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        return text

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        avg_bits: float | None = None,
        chat: bool = True,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Start a reply: iterate over what this returns for its text, see ``Generation``.

        prompt: text (as a user's message in the bundle's chat template, if it has one and ``chat``
        is true; as it stands otherwise), token ids, or a list of messages; avg_bits: sets the
        engine's budget, as the property does; the rest: see ``Sampling``.  The reply ends at
        ``max_tokens``, an end token, a stop text or the end of the context.
        Raises UsageError at once for a bad value or a prompt that is empty or too long.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(max_tokens, temperature, top_k, top_p, seed, stops)
        tokens = self._prompt_tokens(prompt, chat)
        if avg_bits is not None:
            self.avg_bits = avg_bits
        return Generation(lambda record: self._steps(tokens, sampling, record), len(tokens), stops, self._tell)

    def _tell(self, seconds: float, bits: float) -> None:
        listener = self.on_token  # may be taken away by another thread
        if listener is not None:
            listener(seconds, bits)

    def score(self, tokens: Sequence[int], avg_bits: float) -> Score:
        """How well the model predicts ``tokens`` at a budget; the engine's own budget is left alone.

        tokens: 2 to ``context_length`` ids.  Memory is that of one prompt chunk.
        """
        if not 2 <= len(tokens) <= self._context:
            raise UsageError(f"{len(tokens)} tokens to score: needed 2 to {self._context}")
        budget = np.array([self.manifest.budget.check(avg_bits, str(self.path))], np.float32)
        ids = self._checked(tokens)
        nll, bits = 0.0, 0.0
        with self._alone(), engine_errors(f"{self.path}: scoring failed"):
            generator = self._generator(len(ids), {"do_sample": False}, budget)
            for start in range(0, len(ids), self._chunk):
                chunk = ids[start : start + self._chunk]
                generator.append_tokens(chunk)
                targets = ids[start + 1 : start + 1 + len(chunk)]
                logits = generator.get_output("logits")[0, : len(targets)]
                nll += mean_nll(logits, targets) * len(targets) if len(targets) else 0.0
                bits += _bits_used(generator) * len(chunk)
        if not math.isfinite(nll):
            raise BundleError(f"{self.path}: the model's logits are not finite at {avg_bits:g} bits; export it again")
        return Score(nll / (len(ids) - 1), bits / len(ids))

    def time_passes(self, sizes: Sequence[int], avg_bits: float) -> Passes:
        """Time a row of passes over random tokens: no tokenizer, no sampling, no end; the budget is left alone.

        sizes: tokens that each pass adds to one context, as [128] for a prompt or [1] * 64 for decoding.
        """
        if not sizes or min(sizes) < 1 or sum(sizes) > self._context:
            raise UsageError(f"{sum(sizes)} tokens to time: needed 1 to {self._context}, and at least 1 in each pass")
        budget = np.array([self.manifest.budget.check(avg_bits, str(self.path))], np.float32)
        ids = np.random.default_rng(0).integers(0, self.manifest.model.vocab_size, sum(sizes), np.int32)
        seconds, bits, start = [], 0.0, 0
        with self._alone(), engine_errors(f"{self.path}: a pass failed"):
            generator = self._generator(len(ids), {"do_sample": False}, budget)
            for size in sizes:
                begin_s = time.perf_counter()
                for at in range(start, start + size, self._chunk):
                    chunk = ids[at : min(at + self._chunk, start + size)]
                    generator.append_tokens(chunk)
                    bits += _bits_used(generator) * len(chunk)
                seconds.append(time.perf_counter() - begin_s)
                start += size
        return Passes(tuple(seconds), bits / len(ids))

    def _prompt_tokens(self, prompt: Prompt, chat: bool) -> NDArray[np.int32]:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise UsageError("the prompt is empty; give some text")
            if chat and self.has_chat_template:
                ids = self.encode(self.chat_prompt([{"role": "user", "content": prompt}]))
            else:
                ids = self.encode(prompt, add_bos=True)
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self.encode(self.chat_prompt(prompt))  # type: ignore[arg-type]
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        if not ids:
            raise UsageError("the prompt is empty; give some text, or at least one token")
        if len(ids) >= self._context:
            raise UsageError(
                f"the prompt is {len(ids)} tokens long; with room for a reply the bundle takes at most "
                f"{self._context - 1}; shorten it"
            )
        return self._checked(ids)

    def _checked(self, tokens: Sequence[int]) -> NDArray[np.int32]:
        ids = np.asarray(tokens, np.int64)
        vocab = self.manifest.model.vocab_size
        if ids.min() < 0 or ids.max() >= vocab:
            bad = int(ids[(ids < 0) | (ids >= vocab)][0])
            raise UsageError(f"token id {bad}: the model's ids go from 0 to {vocab - 1}")
        return ids.astype(np.int32)

    def _alone(self) -> _Alone:
        return _Alone(self._busy)

    def _generator(self, max_length: int, options: Mapping[str, Any], budget: NDArray[np.float32]) -> Any:
        """A native generator whose cache holds ``max_length`` tokens."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length, **options)
        generator = self._og.Generator(self._model, params)
        generator.set_model_input("avg_bits", budget)
        return generator

    def _steps(self, prompt: NDArray[np.int32], sampling: Sampling, record: Record) -> Generator[Step, None, None]:
        length = min(self._context, len(prompt) + sampling.max_tokens)
        options = sampling.search_options(self.manifest.model.vocab_size)
        with self._alone(), engine_errors(f"{self.path}: generation failed"):
            generator = self._generator(length, options, self._budget)
            # Native calls hold Python's lock: chunks let other threads and Ctrl-C in, and bound the logits.
            for start in range(0, len(prompt), self._chunk):
                if record.stopping:
                    return
                chunk = prompt[start : start + self._chunk]
                generator.append_tokens(chunk)
                record.prompt_bits += _bits_used(generator) * len(chunk) / len(prompt)
            stream = self._tokenizer.create_stream()
            while not (record.stopping or generator.is_done()):
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                ends = token in self._eos
                yield Step(token, _bits_used(generator), "" if ends else stream.decode(token), ends)


class _Alone:
    """Hold a lock that nobody waits for: a second user is told so."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UsageError(_BUSY)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _check_text(text: str) -> None:
    """The tokenizer takes C strings: what follows a NUL character would be lost without a word."""
    if "\0" in text:
        raise UsageError(f"text has a NUL character at position {text.index(chr(0))}; remove it")


def _bits_used(generator: Any) -> float:
    return float(generator.get_output("avg_bits_used")[0])


def _ids(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _read_config(path: Path, manifest: Manifest) -> Any:
    """genai_config.json, checked where this class relies on it.  Raises BundleError.

    The library it names is code that will run: none but the bundle's own is let through.
    """
    file = path / "genai_config.json"
    try:
        config = json.loads(file.read_bytes())
        decoder = config["model"]["decoder"]
        library = decoder["session_options"].get("custom_ops_library")
        fixed = (
            ("model.decoder.filename", decoder["filename"], "model.onnx"),
            ("custom_ops_library", library, OPS_LIBRARY if manifest.native else None),
            ("model.context_length", config["model"]["context_length"], manifest.model.context_length),
            ("model.vocab_size", config["model"]["vocab_size"], manifest.model.vocab_size),
        )
        config["model"]["eos_token_id"], config["search"]["chunk_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{file}: incomplete or unreadable ({error!r}); export the bundle again") from None
    for field, seen, needed in fixed:
        if seen != needed:
            raise BundleError(f"{file}: {field} is {seen!r}, needed {needed!r}; export the bundle again")
    return config


def _leading_token(tokenizer: Any) -> int | None:
    """The token the tokenizer's files say every text begins with, if they say so."""
    plain = list(tokenizer.encode("a"))
    tokenizer.update_options(add_special_tokens="true")
    full = list(tokenizer.encode("a"))
    tokenizer.update_options(add_special_tokens="false")
    opening = full[: len(full) - len(plain)]
    return int(opening[0]) if opening and full[len(opening) :] == plain else None
