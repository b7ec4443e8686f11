"""``Engine``: a loaded bundle with its tokenizer, which makes replies and scores texts."""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.genai_config import read_settings
from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.errors import BundleError, PromptTooLongError, UsageError
from mbq_runtime.fidelity import TokenFidelity

from . import pass_costs
from .allowance import Allowance
from .backend import Backend, choose_engine, load_backend
from .decoding import Decoding
from .generation import Generation, Likelihood, Record, Sampling, Step, TokenListener
from .grammar import Grammar, Grammars
from .imports import engine_errors
from .kept_context import KeptContext
from .load import open_bundle
from .pass_costs import PassCosts
from .prompt import Prompt, checked_ids, ends_in_text, prompt_ids, rendered
from .reasoning import Marks, find_marks, follow
from .sampling import Sampler
from .score import (
    Pass,
    Passes,
    Score,
    Window,
    compare,
    join_logits,
    rate,
    rate_tokens,
    read_passes,
    scoring_chunk,
    time_passes,
)
from .session_file import owner
from .speculation import Guesser, Mode, check_mode
from .template import Message
from .threads import cores
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

_OTHER_SESSION = "session: it is another engine's; make one with this engine's session()"
_BUSY = "this engine is already generating; read that reply to its end, close() it, or load a second engine"


class Engine:
    """A loaded bundle.  Make one with ``Engine.load``.

    One reply runs at a time.  ``avg_bits`` may be set from any thread at any time.

    path: folder of the bundle.
    manifest: the bundle's manifest.
    name: kind of engine, a key of ``backend.ENGINES``.
    threads, context: see ``load``.

    ``speculate`` is "off", "on" or "auto": whether several tokens are guessed and checked in one pass, see
    ``speculation``.  The reply is the same.  A new value takes effect at the next token.

    >>> engine = Engine.load("my-bundle", threads=1)
    >>> reply = engine.generate("Hello", max_tokens=4, avg_bits=8.0)
    >>> reply.text()
    'Hi, '
    >>> reply.stats.finish_reason
    'length'
    """

    def __init__(self, path: Path, manifest: Manifest, name: str, threads: int | None, context: int | None) -> None:
        self.path, self.manifest, self.name = path, manifest, name
        settings = read_settings(path, manifest)
        self._context = most = manifest.model.context_length
        if context is not None:
            if not 2 <= context <= most:
                raise UsageError(f"context {context}: {path} takes 2 to {most} tokens")
            self._context = context
        self._threads = self._most_threads = threads or cores()
        self._loaded: Backend | None = load_backend(name, path, manifest, self._threads)
        self._eos = frozenset(settings.eos_token_ids)
        self._chunk = settings.chunk_size
        self._scoring_chunk = scoring_chunk(manifest.model.vocab_size, self._chunk)
        self._wish = manifest.budget.default_bits
        self._ceiling: float | None = None
        self._speculate: Mode = "off"
        self._rewinds = self._loaded.rewinds
        self._budget = Allowance(manifest, self._wish)
        self._memory_bytes = manifest.engine_bytes(name) + self.session().first_bytes
        self._busy = threading.Lock()
        self._listeners: tuple[TokenListener, ...] = ()  # replaced, never changed: replies read it without the lock
        self._listeners_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        avg_bits: float | None = None,
        context: int | None = None,
        engine: str | None = None,
    ) -> Engine:
        """Load a bundle.

        Args:
            path: folder of the bundle, or a source such as hf:OWNER/NAME, which is pulled into the cache folder once.
            threads: processor threads; None for one per big core.
            avg_bits: first budget in average bits per weight; None for the bundle's default.
            context: most tokens of prompt and reply together, which cost memory; None for the bundle's most.
            engine: kind of engine, a key of ``backend.ENGINES``; None for the bundle's default.

        Raises:
            BundleError: the bundle is incomplete, or not for this machine.
            UsageError: an argument is out of range, the bundle does not have the engine, or a package that the engine
                needs is not installed.
        """
        folder, manifest = open_bundle(path, threads)
        if avg_bits is not None:
            manifest.budget.check(avg_bits, str(path))
        start_s = time.perf_counter()
        loaded = cls(folder, manifest, choose_engine(manifest, folder, engine), threads, context)
        log.info(
            "%s: loaded in %.2f s by engine %s with %d threads, context %d, chunks of %d tokens",
            folder, time.perf_counter() - start_s, loaded.name, loaded.threads, loaded.context_length, loaded._chunk,
        )  # fmt: skip
        if avg_bits is not None:
            loaded.avg_bits = avg_bits
        return loaded

    @property
    def _backend(self) -> Backend:
        """The model.  A sleeping one is loaded."""
        if self._loaded is None:
            self._loaded = load_backend(self.name, self.path, self.manifest, self._most_threads)
            self._loaded.use_threads(self._threads)
        return self._loaded

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._backend.tokenizer

    @property
    def asleep(self) -> bool:
        """Whether the model is not in memory."""
        return self._loaded is None

    @property
    def memory_bytes(self) -> int:
        """Bytes that the model takes when it is loaded: its files, and the first context with its states."""
        return self._memory_bytes

    def sleep(self) -> None:
        """Free the memory of the model.  The next reply loads it again.  Sessions from before are refused then.

        Texts are still encoded and rendered, without the model.

        Raises:
            UsageError: a reply is running.
        """
        with self._alone():
            _ = self._tokenizer  # stays
            self._loaded = None
        gc.collect()

    @property
    def avg_bits(self) -> float:
        """The budget: average bits per weight that a token may use.  A new value takes effect at the next token.

        A value outside the bundle's range raises UsageError.
        """
        return self._budget.bits

    @avg_bits.setter
    def avg_bits(self, value: float) -> None:
        """Set the budget.

        Args:
            value: average bits per weight.
        """
        self._wish = self.manifest.budget.check(value, str(self.path))
        self._budget.set(self._wish, self._ceiling)

    @property
    def ceiling_bits(self) -> float | None:
        """Most bits per weight that any token reads, whatever the budget; None for the bundle's own.

        Between the bits of two depths, the ceiling is the lower depth.  A bundle that is still being pulled has one.
        A new value takes effect at the next token.
        """
        return self._ceiling

    @ceiling_bits.setter
    def ceiling_bits(self, value: float | None) -> None:
        """Set the ceiling.

        Args:
            value: bits per weight, or None.
        """
        self._ceiling = None if value is None else self.manifest.budget.check(value, str(self.path))
        self._budget.set(self._wish, self._ceiling)

    def _allowed(self, avg_bits: float) -> Allowance:
        return Allowance(self.manifest, self.manifest.budget.check(avg_bits, str(self.path)), self._ceiling)

    @property
    def speculate(self) -> str:
        """Whether tokens are guessed: "off", "on" or "auto".  Another value raises UsageError."""
        return self._speculate

    @speculate.setter
    def speculate(self, mode: str) -> None:
        """Set the mode.

        Args:
            mode: "off", "on" or "auto".
        """
        if check_mode(mode) == "on" and not self._rewinds:
            raise UsageError(
                f"{self.path}: speculate: the states of this model cannot be taken back when a guess is wrong; "
                "leave it off"
            )
        self._speculate = check_mode(mode) if self._rewinds else "off"

    @property
    def threads(self) -> int:
        """Processor threads in use.

        A new number takes effect within a token, in all engines of this bundle in the process.  Portable bundles and
        GPU engines keep their number.  A number below 1, or above the one that the engine was loaded with, raises
        UsageError.
        """
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        """Set the number of threads.

        Args:
            count: from 1 to the number that the engine was loaded with.
        """
        if not 1 <= count <= self._most_threads:
            raise UsageError(f"threads {count}: needed 1 to {self._most_threads}, with which the engine was loaded")
        if self._loaded is None or self._loaded.use_threads(count):
            self._threads = count

    @property
    def context_length(self) -> int:
        """Tokens of prompt and reply together."""
        return self._context

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle can render a conversation."""
        return self._tokenizer.has_chat_template

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """The token ids of a text.

        Args:
            text: any text.
            add_bos: put the model's opening token first, if its tokenizer has one.

        Raises:
            UsageError: the text has half a character, which UTF-8 cannot express.

        >>> Engine.load("my-bundle").encode("AB")
        [68, 69]
        """
        ids = self._tokenizer.encode(text)
        return [*self.opening_tokens, *ids] if add_bos else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, as ``generate`` gives it.

        Args:
            tokens: ids; those of special tokens have no text.

        Raises:
            UsageError: an id is out of range.
        """
        if tokens:
            self._checked(tokens)
        stream = self._tokenizer.stream()
        return "".join([stream.add(token) for token in tokens]) + stream.rest()

    @property
    def opening_tokens(self) -> list[int]:
        """What the tokenizer puts before every text: [bos] or nothing."""
        return self._tokenizer.opening_tokens

    def chat_template(self, *, tools: bool = False) -> str:
        """The text of the chat template.

        Args:
            tools: that of conversations with tools, where the bundle has one of its own.

        Raises:
            BundleError: the bundle has no chat template.
        """
        return self._tokenizer.template.source(tools)

    def special_id(self, text: str) -> int | None:
        """The id of a special token; None where the text is none.

        Args:
            text: its whole text, such as "<|im_end|>".
        """
        return self._tokenizer.special_id(text)

    def spell(self, token: int) -> bytes:
        """The bytes of a token, which need not be whole characters.

        Args:
            token: its id.

        >>> Engine.load("my-bundle").spell(68)
        b'A'
        """
        return self._tokenizer.spell(token)

    def has_text(self, token: int) -> bool:
        """Whether a token is part of the text of a reply: special ones are not.

        Args:
            token: its id.
        """
        return self._tokenizer.has_text(token)

    def chat_prompt(self, messages: Sequence[Message], template_kwargs: Mapping[str, Any] | None = None) -> str:
        """Render a conversation by the bundle's chat template, ready for the reply.

        A last message of the role assistant, without calls, is what the reply continues: its text comes last.

        Args:
            messages: each with "role" and "content", and what else the template knows.
            template_kwargs: variables of the template, such as ``enable_thinking``, ``tools`` or ``documents``.

        Raises:
            BundleError: the bundle has no chat template, or one that fails or takes too much time or memory.
            UsageError: the template refuses the conversation, or has no such variable, or the last message cannot be
                continued.
        """
        return rendered(messages, self._tokenizer, template_kwargs)

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
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        shown: Sequence[str] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        reasoning_budget: int | None = None,
        session: KeptContext | None = None,
        continues: bool | None = None,
    ) -> Generation:
        """Start a reply.  It ends at ``max_tokens``, an end token, a stop text or the end of the context.

        Args:
            prompt: text, token ids, or a list of messages.  If the last one is the model's, the reply continues it.
            max_tokens: most tokens of the reply, at least 1.
            avg_bits: sets the engine's budget, as the property does; None leaves it.
            chat: put a text into the bundle's chat template, if it has one, as a user's message.
            temperature: below 1e-5 takes the likeliest token; a higher value is more varied.
            top_k: choose among this many likeliest tokens; 0 among all.
            top_p: choose among the likeliest tokens of this total probability, above 0 and at most 1.
            seed: repeats a varied reply; None for a different one each time.
            stop: text or texts that end the reply and are not part of it.
            min_p: leave out tokens less likely than this share of the likeliest one, 0 to 1.
            repetition_penalty: above 1 makes the tokens of prompt and reply less likely, below 1 more.
            presence_penalty: above 0 makes the tokens of the reply less likely, -2 to 2.
            frequency_penalty: the same for each time that the reply has a token.
            logit_bias: what is added to the scores of tokens, by id, each -100 to 100.
            logprobs: fill ``GenerationStats.likelihoods``, each with this many of the likeliest tokens; None: do not.
            grammar: what the reply may say, after its reasoning.
            shown: special tokens whose text is part of the reply.
            template_kwargs: variables of the chat template, see ``chat_prompt``; only for a prompt that it renders.
            reasoning_budget: most tokens of reasoning, after which it is ended; None for no limit.  A model that has
                none ignores it.
            session: made by ``session``; of the prompt, only what it does not keep is read.
            continues: whether the reply is more of the prompt's text, so that a space between them is part of it; None:
                for a text without a template, and for a last message of the model.

        Returns:
            An iterator over the text of the reply.  Nothing runs until its first piece is asked for.

        Raises:
            UsageError: a value is out of range, the prompt is empty or too long, or the grammar is not understood.
        """
        if session is not None and not session.belongs_to(self._backend):
            raise UsageError(_OTHER_SESSION)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(
            max_tokens, temperature, top_k, top_p, seed, stops, min_p, repetition_penalty, presence_penalty,
            frequency_penalty, logit_bias or {}, logprobs,
        )  # fmt: skip
        if sampling.logit_bias:
            self._checked([*sampling.logit_bias])
        ids = self.prompt_tokens(prompt, chat=chat, template_kwargs=template_kwargs)
        matcher = None if grammar is None else self._grammars.matcher(grammar)
        reasoning = follow(ids, reasoning_budget, self.reasoning_marks, self._tokenizer, self.path)
        if avg_bits is not None:
            self.avg_bits = avg_bits
        if continues is None:
            continues = ends_in_text(prompt, templated=chat and self.has_chat_template)
        tokens = np.asarray(ids, np.int32)
        sampler = Sampler(sampling, tokens, matcher, self.path, reasoning)
        length = min(self._context, len(ids) + max_tokens)
        stream = self._tokenizer.stream(shown, after=ids if continues else ())
        decoding = Decoding(tokens, length, self._chunk, self._eos, sampler, stream)
        return Generation(lambda record: self._steps(decoding, session, record), len(ids), stops, self._tell)

    @cached_property
    def reasoning_marks(self) -> Marks | None:
        """The texts around the reasoning of this model; None where it has none."""
        return find_marks(self.chat_template()) if self.has_chat_template else None

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.path, self.manifest.model.vocab_size, sorted(self._eos))

    def session(self) -> KeptContext:
        """A session for ``generate``: it keeps what it has read from one reply to the next.

        A reply is the one that would come without a session, as long as the budget stays.  A token that was read with
        a budget lower by more than ``REREAD_BITS`` is read again.  A model with states (convolutions, delta nets) goes
        back to one place alone, shortly before the end of its last prompt; before that it begins again.

        >>> engine = Engine.load("my-bundle", threads=1)
        >>> session = engine.session()
        >>> _ = engine.generate([68, 69, 70], max_tokens=2, session=session).text()
        >>> reply = engine.generate([68, 69, 70, 71, 72, 73], max_tokens=2, session=session)
        >>> _ = reply.text()
        >>> reply.stats.cached_tokens
        4
        """
        return KeptContext(self._backend, self._budget, self._context, self._chunk, marks=True)

    def save_session(self, session: KeptContext, path: str | os.PathLike[str]) -> None:
        """Write what a session keeps to a file.  The file is whole, or as it was.

        Args:
            session: of this engine.
            path: the file; keys and values take as many bytes as in memory.

        Raises:
            UsageError: the engine gives no keys and values, or the file cannot be written.
        """
        if not session.belongs_to(self._backend):
            raise UsageError(_OTHER_SESSION)
        session.save(Path(path), owner(self.path, self.name, self._backend))

    def load_session(self, path: str | os.PathLike[str]) -> KeptContext:
        """A session with what ``save_session`` wrote.

        Args:
            path: the file; where there is none, the session is empty.

        Raises:
            UsageError: the engine takes no keys and values, or the file is damaged, or of another bundle, engine or
                version.
        """
        session, about = self.session(), owner(self.path, self.name, self._backend)
        if Path(path).exists():
            session.load(Path(path), about)
        return session

    def add_listener(self, listener: TokenListener) -> None:
        """Call ``listener`` after each decoded token, from the next token on.  From any thread.

        The thread that reads the reply makes the call.  The first token of a reply is left out: its time is that of
        the prompt.  An exception of a listener ends the reply.

        Args:
            listener: called as ``listener(seconds, avg_bits_used)``: the token's share of the duration of its pass, and
                the average bits per weight that it used.  A listener that is added twice is called twice.
        """
        with self._listeners_lock:
            self._listeners = (*self._listeners, listener)

    def remove_listener(self, listener: TokenListener) -> None:
        """Stop calling ``listener``.  From any thread; does nothing when the engine has no such listener.

        Args:
            listener: what ``add_listener`` was given.  Of a listener that was added twice, one call stays.
        """
        with self._listeners_lock:
            kept = list(self._listeners)
            if listener in kept:
                kept.remove(listener)
            self._listeners = tuple(kept)

    def _tell(self, seconds: float, bits: float) -> None:
        for listener in self._listeners:
            listener(seconds, bits)

    def logits(self, tokens: Sequence[int], avg_bits: float) -> Window:
        """The logits of every token of a text.  The engine's budget does not change.

        Args:
            tokens: 1 to ``context_length`` ids.
            avg_bits: budget in average bits per weight.
        """
        if not 1 <= len(tokens) <= self._context:
            raise UsageError(f"{len(tokens)} tokens: needed 1 to {self._context}")
        with closing(self._passes(tokens, avg_bits)) as passes:
            return join_logits(passes)

    def score(self, tokens: Sequence[int], avg_bits: float) -> Score:
        """Measure how well the model predicts a text.  The engine's budget does not change.

        Memory: the logits of one pass, see ``scoring_chunk``.

        Args:
            tokens: 2 to ``context_length`` ids.
            avg_bits: budget in average bits per weight.

        Raises:
            BundleError: the logits are not finite.
        """
        if not 2 <= len(tokens) <= self._context:
            raise UsageError(f"{len(tokens)} tokens to score: needed 2 to {self._context}")
        with closing(self._passes(tokens, avg_bits)) as passes:
            found = rate(tokens, passes)
        if not math.isfinite(found.nll):
            raise BundleError(f"{self.path}: the model's logits are not finite at {avg_bits:g} bits; export it again")
        return found

    def likelihoods(self, tokens: Sequence[int], avg_bits: float, count: int = 0) -> list[Likelihood]:
        """How likely each token of a text is, given those before it.  The engine's budget does not change.

        Args:
            tokens: 1 to ``context_length`` ids.
            avg_bits: budget in average bits per weight.
            count: how many of the likeliest tokens are told besides.

        Returns:
            One for each token.  That of the first, before which there is nothing, is NaN.

        Raises:
            UsageError: there are too many tokens, or one or the budget is out of range.
            BundleError: the logits are not finite.
        """
        if not 1 <= len(tokens) <= self._context:
            raise UsageError(f"{len(tokens)} tokens: needed 1 to {self._context}")
        with closing(self._passes(tokens, avg_bits)) as passes:
            return rate_tokens(tokens, passes, count, self.path)

    def score_against(
        self, tokens: Sequence[int], avg_bits: float, original: NDArray[np.float32]
    ) -> tuple[TokenFidelity, float]:
        """Compare the model with the original that it was made of, on a text.  The engine's budget does not change.

        Args:
            tokens: 2 to ``context_length`` ids, S of them.
            avg_bits: budget in average bits per weight.
            original: the original model's logits on the same tokens, float32 [S, vocab].

        Returns:
            The comparison at the S - 1 positions before a token, and the average bits used.

        Raises:
            UsageError: the original has another vocabulary.
        """
        if not 2 <= len(tokens) <= self._context:
            raise UsageError(f"{len(tokens)} tokens to score: needed 2 to {self._context}")
        with closing(self._passes(tokens, avg_bits)) as passes:
            return compare(tokens, passes, original, self.path)

    def _passes(self, tokens: Sequence[int], avg_bits: float) -> Generator[Pass, None, None]:
        """The passes over a text.  Logits are valid until the next.

        The engine is busy until the generator is closed: an exception in the caller does not close it.
        """
        budget, ids = self._allowed(avg_bits), self._checked(tokens)
        with self._alone(), engine_errors(f"{self.path}: scoring failed"):
            yield from read_passes(self._backend, ids, budget, self._scoring_chunk)

    def time_passes(self, sizes: Sequence[int], avg_bits: float) -> Passes:
        """Time passes over random tokens, without tokenizer and sampling.  The engine's budget does not change.

        Args:
            sizes: tokens that each pass adds to one context: [128] for a prompt, [1] * 64 for decoding.
            avg_bits: budget in average bits per weight.
        """
        if not sizes or min(sizes) < 1 or sum(sizes) > self._context:
            raise UsageError(f"{sum(sizes)} tokens to time: needed 1 to {self._context}, and at least 1 in each pass")
        budget = self._allowed(avg_bits)
        ids = np.random.default_rng(0).integers(0, self.manifest.model.vocab_size, sum(sizes), np.int32)
        with self._alone(), engine_errors(f"{self.path}: a pass failed"):
            return time_passes(self._backend, ids, sizes, budget, self._chunk)

    def prompt_tokens(
        self, prompt: Prompt, *, chat: bool = True, template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids that ``generate`` reads for a prompt.

        Args:
            prompt: see ``generate``.
            chat: see ``generate``.
            template_kwargs: see ``generate``.

        Raises:
            UsageError: the prompt is empty or too long, or an id is out of range.
        """
        ids = prompt_ids(prompt, self._tokenizer, chat=chat, template_kwargs=template_kwargs)
        if len(ids) >= self._context:
            raise PromptTooLongError(
                f"the prompt is {len(ids)} tokens long; with room for a reply the bundle takes at most "
                f"{self._context - 1}; shorten it"
            )
        self._checked(ids)
        return ids

    def _checked(self, tokens: Sequence[int]) -> NDArray[np.int32]:
        return checked_ids(tokens, self.manifest.model.vocab_size)

    def _alone(self) -> _Alone:
        return _Alone(self._busy)

    def _steps(self, decoding: Decoding, session: KeptContext | None, record: Record) -> Generator[Step, None, None]:
        with self._alone(), engine_errors(f"{self.path}: generation failed"):
            if self._speculate == "on":
                self._time_guesses()  # before the prompt, not between two tokens
            guesser = Guesser(decoding.prompt.tolist(), lambda: self._speculate, lambda: self._pass_costs, self._eos)
            context, length = session, decoding.length
            if context is None:
                context = KeptContext(self._backend, self._budget, length, self._chunk, first=length)
            try:
                yield from decoding.steps(context, guesser, record)
            except GeneratorExit:
                # Behind an end token or a stop text nobody asks for more steps.  Who drops a reply waits for nothing.
                if not record.finish_reason:
                    raise
            if self._speculate == "auto" and not record.stopping:
                self._time_guesses()

    @cached_property
    def _kept_costs(self) -> Path:
        """The file that keeps what passes cost."""
        bits = self._allowed(self.manifest.budget.min_bits).bits, self._allowed(self.manifest.budget.max_bits).bits
        return pass_costs.place(self.path, self.name, self._threads, bits)

    @cached_property
    def _pass_costs(self) -> PassCosts | None:
        """What passes cost; None where it is not known yet."""
        return pass_costs.load(self._kept_costs)

    def _time_guesses(self) -> None:
        """Time passes, unless they have been timed on this machine before."""
        if self._pass_costs is None:
            model, budget = self.manifest.model, self.manifest.budget
            budgets = self._allowed(budget.min_bits), self._allowed(budget.max_bits)
            self._pass_costs = PassCosts.measure(self._backend, budgets, model.vocab_size)
            pass_costs.save(self._pass_costs, self._kept_costs)


class _Alone:
    """Holds a lock that nobody waits for: a second user gets a UsageError."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UsageError(_BUSY)

    def __exit__(self, *_: object) -> None:
        self._lock.release()
