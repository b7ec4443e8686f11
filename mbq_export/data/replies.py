"""What a model itself says: chats that it continues, as a text to calibrate on or to measure on.

``prompts.json`` has the prompts for calibration, ``heldback.json`` those that nothing is calibrated on: single
questions, and conversations of several turns with a system prompt.  The original model answers them once by sampling
with a fixed seed.  The finished chats lie in the cache folder, by a hash of the model and of the prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.cache import cache_dir
from mbq_runtime.errors import ModelError, UsageError
from mbq_runtime.whole_file import write_whole

from ..model.blocks import fast_passes
from ..model.checkpoint import Checkpoint
from ..model.gradients import drawn
from ..progress import Report, StageReport, staged
from .documents import Messages, messages_of

log = logging.getLogger(__name__)

HELD_BACK = Path(__file__).with_name("heldback.json")
"""The prompts that nothing is calibrated on."""
CALIBRATION = Path(__file__).with_name("prompts.json")
"""The prompts for calibration: some that slices are fitted to, and some that are held back from that."""
KINDS = ("chat", "conversation")

_REPLY_TOKENS = 256
_CALIBRATION_REPLY_TOKENS = 128
"""Short replies are of more prompts at equal work."""
_ENOUGH_TOKENS = 13_000
"""24 windows of 512 tokens, and a rest.  The prompts are answered again, by other random numbers, until there are so
many."""
_MOST_ROUNDS = 6
_TEMPERATURE = 0.8
_SAMPLING = {"do_sample": True, "temperature": _TEMPERATURE, "top_k": 0, "top_p": 1.0}
_SEED = 0
_BATCH = 64
_CALIBRATION_BATCH = 128
"""All chats of the default calibration at once.  The few chats of a second batch would take as many steps."""
_LIKELY_SHARE = 0.85
"""How much of its longest length a short reply has on average, with something to spare."""


@dataclass(frozen=True)
class _Length:
    """How long a text gets, and how it is written.

    All of it has ``enough`` tokens or more, and one reply ``reply`` at most.  ``batch`` chats are written at once.
    fast: whether no more is done than a calibration needs, and in the device's fast products.  What is measured on is
    the same everywhere.  version: goes into the hash.  It rises when the replies would change.
    """

    enough: int
    reply: int
    batch: int
    version: int
    fast: bool = False


@dataclass
class _Chat:
    """A chat that grows.

    turns: what the user says, from now on; messages: what was said.
    """

    turns: list[str]
    messages: Messages = field(default_factory=list)


def held_back(kind: str, checkpoint: Checkpoint, report: Report) -> str:
    """The chats of a model on the held-back prompts, by its chat template.

    Args:
        kind: "chat" or "conversation".
        checkpoint: the original model.
        report: told how many replies are done.

    Raises:
        ModelError: the tokenizer has no chat template, or its template refuses the chats.
    """
    if checkpoint.tokenizer.chat_template is None:
        raise ModelError(
            f"text {kind}: the tokenizer of {checkpoint.source.name} has no chat template; leave this text out"
        )
    chats = json.loads(HELD_BACK.read_text(encoding="utf-8"))[kind]
    return _said(checkpoint, kind, chats, _Length(_ENOUGH_TOKENS, _REPLY_TOKENS, _BATCH, version=1), report)


def answers(part: str, checkpoint: Checkpoint, tokens: int, report: Report) -> str:
    """The chats of a model on the prompts for calibration, by its chat template where there is one.

    Args:
        part: "fitted" or "held_back".
        checkpoint: the original model.
        tokens: how many are needed.
        report: told how many tokens are done.

    Raises:
        ModelError: the template refuses the chats.
    """
    chats = json.loads(CALIBRATION.read_text(encoding="utf-8"))[part]
    length = _Length(tokens, _CALIBRATION_REPLY_TOKENS, _CALIBRATION_BATCH, version=2, fast=True)
    return _said(checkpoint, part, chats, length, report)


def _said(checkpoint: Checkpoint, name: str, chats: Sequence[Any], length: _Length, report: Report) -> str:
    """The chats with the model's replies."""
    file = cache_dir() / "replies" / f"{name}-{_key(checkpoint, chats, length)}.json"
    said = _kept(file)
    if said is None:
        said = _answered(checkpoint, chats, length, staged(report, f"writing replies ({name})"))
        _keep(said, file)
    return "".join(_rendered(checkpoint, messages) for messages in said)


def _kept(file: Path) -> list[Messages] | None:
    """The chats of an earlier run; None where there are none, or they cannot be used."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise ValueError("no list of chats")
        return [messages_of(chat, "the file") for chat in found]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, UsageError) as error:
        log.warning("%s: ignored (%s); the model writes its replies again", file, error)
        return None


def _keep(said: list[Messages], file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps(said, indent=1) + "\n").encode())
    except OSError as error:
        log.warning("the model's replies are not kept for the next time: %s", error)


def _key(checkpoint: Checkpoint, chats: object, length: _Length) -> str:
    """A hash of all that the replies depend on."""
    settings = [length.version, length.reply, length.enough, _MOST_ROUNDS, _TEMPERATURE, _SEED, length.batch, chats]
    found = hashlib.sha256(json.dumps([settings, checkpoint.tokenizer.chat_template], sort_keys=True).encode())
    found.update(checkpoint.model.config.to_json_string().encode())
    for name, tensor in checkpoint.model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _answered(checkpoint: Checkpoint, chats: Sequence[Any], length: _Length, progress: StageReport) -> list[Messages]:
    """Chats with the model's replies, until there are enough tokens.  After the last chat it begins again."""
    said: list[Messages] = []
    tokens = 0
    progress(tokens, length.enough)
    each = _likely_tokens(checkpoint, chats, length) if length.fast else length.reply
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        while tokens < length.enough and len(said) < _MOST_ROUNDS * len(chats):
            count = min(length.batch, math.ceil((length.enough - tokens) / each))
            part = _continued(checkpoint, [chats[(len(said) + i) % len(chats)] for i in range(count)], length)
            said += part
            tokens += sum(len(checkpoint.tokens(_rendered(checkpoint, messages))) for messages in part)
            progress(min(tokens, length.enough), length.enough)
    return said


def _likely_tokens(checkpoint: Checkpoint, chats: Sequence[Any], length: _Length) -> float:
    """Tokens that a chat probably gets: what is given, by the template, and a reply to each question."""
    tokens, replies = 0, 0
    for chat in map(_opened, chats):
        for question in chat.turns:
            chat.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        tokens += len(checkpoint.tokens(_rendered(checkpoint, chat.messages)))
        replies += len(chat.turns)
    return (tokens + replies * _LIKELY_SHARE * length.reply) / len(chats)


def _continued(checkpoint: Checkpoint, chats: Sequence[Any], length: _Length) -> list[Messages]:
    """A batch of chats with the model's replies."""
    part = [_opened(chat) for chat in chats]
    while asked := [chat for chat in part if chat.turns]:
        for chat in asked:
            chat.messages.append({"role": "user", "content": chat.turns.pop(0)})
        _reply(checkpoint, asked, length)
    return [chat.messages for chat in part]


def _opened(chat: Any) -> _Chat:
    """chat: a question, or an object with ``system`` and ``turns``."""
    if isinstance(chat, str):
        return _Chat([chat])
    return _Chat(list(chat["turns"]), [{"role": "system", "content": chat["system"]}])


def _reply(checkpoint: Checkpoint, chats: Sequence[_Chat], length: _Length) -> None:
    """Add the model's reply to every chat.  When the longest fills the model's context, all chats of the batch end."""
    prompts = [checkpoint.tokens(_rendered(checkpoint, chat.messages, asked=True)) for chat in chats]
    room = checkpoint.decoder.context_length - max(map(len, prompts))
    if room < 1:
        for chat in chats:
            chat.turns.clear()
            chat.messages.pop()
        return
    with fast_passes(checkpoint.model, checkpoint.device) if length.fast else torch.no_grad():
        replies = _sampled(checkpoint, prompts, min(length.reply, room), _drawing() if length.fast else _SAMPLING)
    for chat, reply in zip(chats, replies, strict=True):
        content = checkpoint.tokenizer.decode(reply, skip_special_tokens=True).strip()
        chat.messages.append({"role": "assistant", "content": content})


def _drawing() -> dict[str, Any]:
    """Sampling for ``generate`` with one random number a token.  Its own takes one for each token of the vocabulary.

    The drawn token gets the only finite score, so that it is the likeliest.
    """
    from transformers import LogitsProcessorList

    def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = drawn((scores.float() / _TEMPERATURE).softmax(-1).cpu(), torch.default_generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None].to(scores.device), 0.0)

    unused = dict.fromkeys(("temperature", "top_k", "top_p"))
    return {"do_sample": False, "logits_processor": LogitsProcessorList([draw]), **unused}


def _sampled(
    checkpoint: Checkpoint, prompts: Sequence[list[int]], count: int, sampling: Mapping[str, Any]
) -> NDArray[np.int64]:
    """int64 [prompts, up to count]: what the model says after each prompt.  A reply that ends early is padded.

    sampling: arguments of ``generate`` that choose the tokens.
    """
    longest = max(map(len, prompts))
    tokenizer = checkpoint.tokenizer
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = [[padding or 0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    found = checkpoint.model.generate(
        input_ids=torch.tensor(ids).to(checkpoint.device),
        attention_mask=torch.tensor(mask).to(checkpoint.device),
        max_new_tokens=count,
        repetition_penalty=1.0,
        pad_token_id=padding or 0,
        **sampling,
    )
    return np.asarray(found[:, longest:].cpu().numpy(), np.int64)


def _rendered(checkpoint: Checkpoint, messages: Messages, asked: bool = False) -> str:
    """A chat by the model's template, or its plain text if there is none.  asked: whether a reply is to follow.

    Some templates refuse a system prompt.  It then stands before the first question.
    """
    if checkpoint.tokenizer.chat_template is None:
        return "".join(f"{message['content']}\n\n" for message in messages)
    from jinja2 import TemplateError

    for found in (messages, _without_system(messages)):
        try:
            return str(checkpoint.tokenizer.apply_chat_template(found, tokenize=False, add_generation_prompt=asked))
        except TemplateError as error:
            refusal = error
    raise ModelError(f"the chat template of {checkpoint.source.name} refuses a plain chat: {refusal}")


def _without_system(messages: Messages) -> Messages:
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]
