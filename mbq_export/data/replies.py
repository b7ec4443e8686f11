"""What a model itself says: chats that it continues, as a text to measure on.

``heldback.json`` has the prompts: single questions, and conversations of several turns with a system prompt.  Nothing
is calibrated on them.  The original model answers them once by sampling with a fixed seed.  The finished chats lie in
the cache folder, by a hash of the model and of the prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.cache import cache_dir
from mbq_runtime.errors import ModelError

from ..model.checkpoint import Checkpoint
from ..progress import Report
from .documents import Messages

HELD_BACK = Path(__file__).with_name("heldback.json")
"""The prompts that nothing is calibrated on."""
KINDS = ("chat", "conversation")

_REPLY_TOKENS = 256
_ENOUGH_TOKENS = 13_000
"""24 windows of 512 tokens, and a rest.  The prompts are answered again, by other random numbers, until there are so
many."""
_MOST_ROUNDS = 6
_TEMPERATURE = 0.8
_SEED = 0
_BATCH = 24
_FORMAT = 1
"""Goes into the hash.  It rises when the replies would change."""


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
    file = cache_dir() / "replies" / f"{kind}-{_key(checkpoint, chats)}.json"
    if not file.is_file():
        said = _answered(checkpoint, chats, report, f"writing replies ({kind})")
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(file)
    return "".join(_rendered(checkpoint, messages) for messages in json.loads(file.read_text(encoding="utf-8")))


def _key(checkpoint: Checkpoint, chats: object) -> str:
    """A hash of all that the replies depend on."""
    settings = [_FORMAT, _REPLY_TOKENS, _ENOUGH_TOKENS, _MOST_ROUNDS, _TEMPERATURE, _SEED, _BATCH, chats]
    found = hashlib.sha256(json.dumps([settings, checkpoint.tokenizer.chat_template], sort_keys=True).encode())
    found.update(checkpoint.model.config.to_json_string().encode())
    for name, tensor in checkpoint.model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _answered(checkpoint: Checkpoint, chats: Sequence[Any], report: Report, what: str) -> list[Messages]:
    """All chats with the model's replies.  Chats are begun again until there are enough tokens."""
    batches = [chats[start : start + _BATCH] for start in range(0, len(chats), _BATCH)]
    said: list[Messages] = []
    tokens = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        for done in range(_MOST_ROUNDS * len(batches)):
            if done >= len(batches) and tokens >= _ENOUGH_TOKENS:
                break
            part = _continued(checkpoint, batches[done % len(batches)])
            said += part
            tokens += sum(len(_ids(checkpoint, _rendered(checkpoint, messages))) for messages in part)
            report(what, min(tokens, _ENOUGH_TOKENS), _ENOUGH_TOKENS)
    return said


def _continued(checkpoint: Checkpoint, chats: Sequence[Any]) -> list[Messages]:
    """A batch of chats with the model's replies."""
    part = [_opened(chat) for chat in chats]
    while asked := [chat for chat in part if chat.turns]:
        for chat in asked:
            chat.messages.append({"role": "user", "content": chat.turns.pop(0)})
        _reply(checkpoint, asked)
    return [chat.messages for chat in part]


def _opened(chat: Any) -> _Chat:
    """chat: a question, or an object with ``system`` and ``turns``."""
    if isinstance(chat, str):
        return _Chat([chat])
    return _Chat(list(chat["turns"]), [{"role": "system", "content": chat["system"]}])


def _reply(checkpoint: Checkpoint, chats: Sequence[_Chat]) -> None:
    """Add the model's reply to every chat.  When the longest fills the model's context, all chats of the batch end."""
    prompts = [_ids(checkpoint, _rendered(checkpoint, chat.messages, asked=True)) for chat in chats]
    room = checkpoint.decoder.context_length - max(map(len, prompts))
    if room < 1:
        for chat in chats:
            chat.turns.clear()
            chat.messages.pop()
        return
    for chat, reply in zip(chats, _sampled(checkpoint, prompts, min(_REPLY_TOKENS, room)), strict=True):
        content = checkpoint.tokenizer.decode(reply, skip_special_tokens=True).strip()
        chat.messages.append({"role": "assistant", "content": content})


def _sampled(checkpoint: Checkpoint, prompts: Sequence[list[int]], count: int) -> NDArray[np.int64]:
    """int64 [prompts, up to count]: what the model says after each prompt.  A reply that ends early is padded."""
    longest = max(map(len, prompts))
    tokenizer = checkpoint.tokenizer
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = [[padding or 0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.no_grad():
        found = checkpoint.model.generate(
            input_ids=torch.tensor(ids, device=checkpoint.device),
            attention_mask=torch.tensor(mask, device=checkpoint.device),
            max_new_tokens=count,
            do_sample=True,
            temperature=_TEMPERATURE,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            pad_token_id=padding or 0,
        )
    return np.asarray(found[:, longest:].cpu().numpy(), np.int64)


def _ids(checkpoint: Checkpoint, rendered: str) -> list[int]:
    return list(checkpoint.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def _rendered(checkpoint: Checkpoint, messages: Messages, asked: bool = False) -> str:
    """A chat by the model's template.  asked: whether a reply is to follow.

    Some templates refuse a system prompt.  It then stands before the first question.
    """
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
