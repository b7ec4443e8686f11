"""What a model computes on a check prompt, and where another form of the model first computes something else.

An export has four forms of one model: the checkpoint as it was loaded, the checkpoint after its weights were
transformed, the same with sliced weights, and the bundle.  Each is recorded, and each is compared with the one before.
So an error is found in the step that makes it, and a step that should change nothing has a small limit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.constants import WEIGHT_STEPS, WEIGHT_TOKENS

from ..format.attention import spread_width
from ..format.codes import Sliced
from .blocks import watching_inputs
from .checkpoint import Checkpoint
from .shape import Decoder
from .sliced_linear import SlicedLinear, sliced_layers, values_at

LAST_TOKENS = 32
"""Tokens of the prompt's end whose values are kept.  They see the whole prompt."""

PROMPT_TOKENS = 300
"""Length of a prompt that needs not be longer."""

_MOST_WORK = 1e12
"""Most tokens times parameters of a prompt that is longer than PROMPT_TOKENS.  It bounds the time."""

_TIE = 10.0
"""Two tokens are tied if their logits differ by less than this many times the limit, in standard deviations."""

_CLEAR = 5.0
"""A place differs clearly if what it adds is off by this many times the limit."""

_SMALLEST = 1e-30

_BORDER = 0.1
"""A number that is as close as this to the border between two codes may have either, in steps."""

_SHAKE = 1e-4
"""Of a number.  As much as numbers of two engines differ."""

_PARTS = {
    "attn_in": "attention",
    "conv_in": "convolution",
    "delta_in": "delta net",
    "mlp_in": "MLP",
    "experts_in": "experts",
    "ple_in": "per-layer embedding",
}

F32 = NDArray[np.float32]

Codes = Mapping[int, tuple[NDArray[np.int8], NDArray[np.int8]]]
"""Codes of cached keys and values by index of the block, int8 [tokens, kv_heads, head_dim]."""


@dataclass(frozen=True)
class Recording:
    """What a model computes at the last tokens of a prompt.

    prompt: int64 [tokens].
    logits: float32 [last, vocab].
    streams: float32 [last, hidden] by place: the residual stream behind the embedding, and behind each attention and
        each MLP, in the order of the model.
    """

    prompt: NDArray[np.int64]
    logits: F32
    streams: dict[str, F32]


@dataclass(frozen=True)
class Difference:
    """Where two forms of a model differ first.

    place: "embedding", a block's attention or MLP such as "layers.0 attention", or "head".
    error: relative error.
    other_tokens: tokens of the prompt's end whose likeliest next token is another one.
    of: what the error is of, for a message.
    """

    place: str
    error: float
    other_tokens: int
    of: str = "the logits"

    def __str__(self) -> str:
        said = f"{self.of} are off by {self.error:.3g} of their size"
        if self.other_tokens:
            said += f", {self.other_tokens} of the likeliest next tokens are others"
        return f"the first difference is in {self.place} ({said})"


def stream_readers(decoder: Decoder) -> dict[str, tuple[str, ...]]:
    """The modules that read the residual stream: norms, or linear layers where a family has no norm.

    Args:
        decoder: the model.

    Returns:
        The modules' names in the checkpoint, by the place that writes the stream right before them.
    """
    places, place = dict[str, tuple[str, ...]](), "embedding"
    for layer in range(decoder.layers):
        units, parts = decoder.layer_units(layer), decoder.readers(layer)
        for part in parts:
            role = f"{part}_in"
            norm = decoder.input_norm(layer, role)
            places[place] = units[role].sources if norm is None else (norm,)
            if part == "mlp" and "experts" not in parts:
                places[place] += _experts_beside(decoder, layer)
            place = f"layers.{layer} {_PARTS[role]}"
    places[place] = (decoder.final_norm,)
    return places


def _experts_beside(decoder: Decoder, layer: int) -> tuple[str, ...]:
    """What reads the same stream as a block's MLP: the norm of experts beside it, and the module that chooses them."""
    norm, chooser = decoder.input_norm(layer, "experts_in"), decoder.chooser(layer)
    if norm is None or chooser is None:
        return ()
    return norm, chooser.rpartition(".")[0]


def prompt_length(checkpoint: Checkpoint) -> int:
    """Tokens of the check prompt: past every window and original context, if the model's size allows it.

    Args:
        checkpoint: the model.
    """
    d = checkpoint.decoder
    edges = [window for layer in range(d.layers) if (window := d.window(layer)) is not None]
    rope = getattr(checkpoint.model.config, "rope_parameters", None) or {}
    edges += [int(rope.get("original_max_position_embeddings") or 0)]
    # The last tokens are all past the edge.
    passing = [edge + LAST_TOKENS for edge in edges if (edge + LAST_TOKENS) * checkpoint.parameters <= _MOST_WORK]
    return min(d.context_length, max([PROMPT_TOKENS, *passing]))


def check_prompt(checkpoint: Checkpoint, text: NDArray[np.int64]) -> NDArray[np.int64]:
    """The prompt that every form of the model is recorded on.

    Args:
        checkpoint: the model.
        text: int64 tokens of any shape; a short text is repeated.

    Returns:
        int64 [tokens].
    """
    return np.resize(text.reshape(-1), prompt_length(checkpoint))


def record(checkpoint: Checkpoint, prompt: NDArray[np.int64], given: Mapping[str, F32] | None = None) -> Recording:
    """Run the checkpoint's model as it is.

    Args:
        checkpoint: the model.
        prompt: int64 [tokens].
        given: float32 [tokens or the last of them, hidden] by place: the streams of another form of the model, which
            the part behind each place reads in place of this model's own.  So what a part adds does not depend on the
            parts before it.
    """
    last, readers = min(LAST_TOKENS, len(prompt)), stream_readers(checkpoint.decoder)
    streams: dict[str, F32] = {}

    def see(place: str, x: torch.Tensor) -> None:
        streams[place] = x[-last:].float().cpu().numpy().copy()

    with (
        watching_inputs(checkpoint, {place: names[0] for place, names in readers.items()}, see),
        _reading(checkpoint, {} if given is None else {name: given[at] for at in readers for name in readers[at]}),
        torch.no_grad(),
    ):
        tokens = checkpoint.on_device(prompt)[None]
        logits = checkpoint.model(tokens, use_cache=False, logits_to_keep=last).logits[0]
    return Recording(prompt, logits.float().cpu().numpy(), streams)


@contextmanager
def _reading(checkpoint: Checkpoint, inputs: Mapping[str, F32]) -> Iterator[None]:
    """Give modules other inputs, float32 [the last tokens, width] by name, while the block runs."""
    with ExitStack() as hooks:
        for name, rows in inputs.items():

            def give(_: torch.nn.Module, args: tuple[torch.Tensor, ...], rows: F32 = rows) -> tuple[torch.Tensor, ...]:
                own, *others = args
                read = own.clone()
                read[..., -len(rows) :, :] = checkpoint.on_device(rows).to(own)
                return read, *others

            hooks.enter_context(checkpoint.model.get_submodule(name).register_forward_pre_hook(give))
        yield


class _RoundedInput(SlicedLinear):
    """A ``SlicedLinear`` whose input is rounded to 8 bits, as ``format.ops.quantize_activations`` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, [..., tokens, N].

        Args:
            x: [..., tokens, K].
        """
        groups = x.reshape(*x.shape[:-1], self.scale.shape[1], -1)
        peak = groups.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST)
        return super().forward(((groups * (127 / peak)).round() * (peak / 127)).reshape(x.shape))


def record_sliced(
    checkpoint: Checkpoint,
    slices: Mapping[str, Sliced],
    embedding: Sliced | None,
    profile: SliceProfile,
    prompt: NDArray[np.int64],
    *,
    per_layer: Sliced | None = None,
    activation_bits: int = 16,
    cached: Codes | None = None,
    shaken: bool = False,
    given: Mapping[str, F32] | None = None,
) -> Recording:
    """Run the checkpoint's model with sliced weights, at full depth.

    Args:
        checkpoint: the model.  Its linear layers are replaced meanwhile.
        slices: by unit name.
        embedding: slices of the embedding, or None to leave it as it is.
        profile: the bits of each slice.
        prompt: int64 [tokens].
        per_layer: slices of the table of per-layer embeddings, or None to leave it as it is.
        activation_bits: 8 rounds the inputs of linear layers; 16 does not, because that changes nothing here.
        cached: codes of keys and values of 8 bits that a bundle has of this prompt, see ``rounded_cache``; None leaves
            keys and values as they are.
        shaken: with ``cached``, change the queries by as much as the arithmetic of two engines differs.
        given: see ``record``.
    """
    kind = _RoundedInput if activation_bits == 8 else SlicedLinear
    model = checkpoint.model
    with ExitStack() as stack:
        if cached is not None:
            stack.enter_context(rounded_cache(checkpoint, cached, shaken=shaken))
        stack.enter_context(sliced_layers(checkpoint, slices, profile, kind))
        if embedding is not None:
            stack.enter_context(_embedded(checkpoint, model.get_input_embeddings(), embedding, profile, prompt))
        if per_layer is not None:
            stack.enter_context(_embedded(checkpoint, model.model.embed_tokens_per_layer, per_layer, profile, prompt))
        return record(checkpoint, prompt, given)


@contextmanager
def rounded_cache(checkpoint: Checkpoint, cached: Codes | None = None, *, shaken: bool = False) -> Iterator[None]:
    """Round as attention over a cache of 8 bits does (``format.attention``), while the block runs.

    A number at the border between two codes gets either by the last bits of its arithmetic, and other codes change
    what later blocks compute.  So such a key or value gets the code that the bundle has.  The bundle does not tell
    those of queries and weights.

    Args:
        checkpoint: the model.
        cached: codes that the bundle has of the same tokens; None for the nearest codes alone.
        shaken: change the queries by as much as the arithmetic of two engines differs.
    """
    kind = checkpoint.model.config._attn_implementation
    before = ALL_ATTENTION_FUNCTIONS.get(kind)

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **more: Any
    ) -> Any:
        # Families have a plain form of their own, which is in no table.
        inner = before or sys.modules[type(module).__module__].eager_attention_forward
        layer = cast(int, module.layer_idx)
        codes = [None, None] if cached is None else [checkpoint.on_device(part) for part in cached[layer]]
        # Engines mix the channels in their own order.
        order = checkpoint.on_device(checkpoint.channel_order(layer))
        query, key = query[..., order], key[..., order]
        if shaken:
            noise = torch.from_numpy(np.random.default_rng(layer).standard_normal(query.shape, np.float32))
            query = query * (1 + _SHAKE * noise.to(query))
        keys, values = (_Rows.of(x, of) for x, of in zip((key, value), codes, strict=True))
        # With the places of tokens as their values, what a token attends to are its weights.
        places = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*key.shape[:3], -1)
        weights = inner(module, _Rows.of(query).whole(), keys.whole(), places, *args, **more)[0].transpose(1, 2)
        attended = values.weighted(weights)
        return attended.transpose(1, 2).to(value.dtype), None

    ALL_ATTENTION_FUNCTIONS[kind] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[kind]


class _Rows(NamedTuple):
    """Rounded rows, spread.  codes: [1, heads, tokens, head_dim]; steps: [1, heads, tokens, 1]."""

    codes: torch.Tensor
    steps: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, codes: torch.Tensor | None = None) -> _Rows:
        """Round rows [1, heads, tokens, head_dim].

        codes: [tokens, heads, head_dim] of the same rows, which numbers at the border of two codes get.
        """
        mixed = _spread(x)
        peak = mixed.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST)
        exact = mixed * (127 / peak)
        rounded = exact.round()
        if codes is not None:
            wanted = codes.transpose(0, 1)[None].to(exact.dtype)
            rounded = torch.where((exact - wanted).abs() <= 0.5 + _BORDER, wanted, rounded)
        return cls(rounded, peak / 127)

    def whole(self) -> torch.Tensor:
        """The rows that these stand for."""
        return _spread(self.codes * self.steps) / spread_width(self.codes.shape[-1])

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums of the rows, with rounded weights.

        weights: [1, query heads, tokens, tokens].
        """
        share = weights.shape[1] // self.codes.shape[1]
        codes, steps = (part.repeat_interleave(share, 1) for part in self)
        factors = []
        for part in (weights * steps.mT).split(WEIGHT_TOKENS, dim=-1):
            step = part.amax(-1, keepdim=True).clamp_min(_SMALLEST) / WEIGHT_STEPS
            factors.append((part / step).round() * step)
        return _spread(torch.cat(factors, -1) @ codes) / spread_width(codes.shape[-1])


def _spread(x: torch.Tensor) -> torch.Tensor:
    """As ``format.attention.spread``."""
    half = 1
    while half < spread_width(x.shape[-1]):
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    return x


@contextmanager
def _embedded(
    checkpoint: Checkpoint, embedding: torch.nn.Module, sliced: Sliced, profile: SliceProfile, prompt: NDArray[np.int64]
) -> Iterator[None]:
    """Put the slices' values into the rows of a table that the prompt reads, while the block runs."""
    used = np.unique(prompt)
    table, rows = cast(torch.Tensor, embedding.weight), checkpoint.on_device(used)
    with torch.no_grad():
        before = table[rows].clone()
        table[rows] = values_at(sliced.rows(used), profile, profile.depths, table.dtype, checkpoint.device)
        try:
            yield
        finally:
            table[rows] = before


def relative_error(expected: F32, found: F32) -> float:
    """Root mean square of the difference over that of the expected values.

    Args:
        expected: float32, any shape.
        found: float32, the same shape.
    """
    size = max(float(np.linalg.norm(expected)), _SMALLEST)
    # A value that is not finite is an error without bound.
    return float(np.nan_to_num(np.linalg.norm(found - expected) / size, nan=np.inf))


def difference(
    expected: Recording, logits: F32, streams: Mapping[str, F32], *, limit: float, rotated: bool = False
) -> Difference | None:
    """Where another form of a model differs first.

    Args:
        expected: of one form.
        logits: float32 [last, vocab] of the other form.
        streams: of the other form, as in ``Recording``; empty if they are not known.
        limit: largest relative error of the logits, and of what a block adds to the stream.
        rotated: whether the streams may be rotated against each other.  Then their products between tokens are
            compared, which a rotation does not change.

    Returns:
        None where the forms are the same: the logits are within the limit, and so are the likeliest tokens.
    """
    found = logits_difference(expected.logits, logits)
    others = _other_tokens(expected.logits, logits, limit)
    if found <= limit and not others:
        return None
    return Difference(_first_place(expected.streams, streams, limit, rotated), found, others)


def logits_difference(expected: F32, found: F32) -> float:
    """Relative error of logits, without what all logits of a token have in common.

    Args:
        expected: float32 [tokens, vocab].
        found: float32 [tokens, vocab].
    """
    return relative_error(_centred(expected), _centred(found))


def _centred(logits: F32) -> F32:
    return np.asarray(logits - logits.mean(1, keepdims=True))


def local_difference(
    expected: Recording, logits: F32, streams: Mapping[str, F32], limits: Mapping[str, float]
) -> Difference | None:
    """The first part that computes something else from the same inputs.

    Args:
        expected: of one form, whose parts read ``streams`` (``record``'s ``given``).
        logits: float32 [last, vocab] of the other form.
        streams: of the other form, as in ``Recording``.
        limits: largest relative error of what a part adds to the stream, by place, and of the logits ("head").

    Returns:
        None where all parts are the same.
    """
    errors, others = local_errors(expected, logits, streams), _other_tokens(expected.logits, logits, limits["head"])
    for place, error in errors.items():
        if error > limits[place]:
            return Difference(place, error, others, of="its outputs")
    return Difference("head", errors["head"], others) if others else None


def local_errors(expected: Recording, logits: F32, streams: Mapping[str, F32]) -> dict[str, float]:
    """Relative error of what each part adds to the stream, by place, and of the logits.

    Args:
        expected: of one form, whose parts read ``streams``.
        logits: float32 [last, vocab] of the other form.
        streams: of the other form, as in ``Recording``.
    """
    of_parts = _errors(expected.streams, streams, rotated=False)
    return {**of_parts, "head": logits_difference(expected.logits, logits)}


def _other_tokens(expected: F32, found: F32, limit: float) -> int:
    """How many tokens have another likeliest next token, ties left out."""
    chosen = np.take_along_axis(expected, found.argmax(1)[:, None], 1)[:, 0]
    return int(((expected.max(1) - chosen) > _TIE * limit * expected.std(1)).sum())


def _first_place(expected: Mapping[str, F32], found: Mapping[str, F32], limit: float, rotated: bool) -> str:
    """The first place that adds something else to the stream; the head if all add the same."""
    if not found:
        return "a place that this engine does not show"
    errors = _errors(expected, found, rotated=rotated)
    # Deep models add up roundings, so a clear difference is looked for first.
    for least in (_CLEAR * limit, limit):
        if above := [place for place, error in errors.items() if error > least]:
            return above[0]
    return "head"


def _errors(expected: Mapping[str, F32], found: Mapping[str, F32], *, rotated: bool) -> dict[str, float]:
    """Relative error of what each place adds to the stream."""
    errors = dict[str, float]()
    for (place, here), there in zip(_added(expected).items(), _added(found).values(), strict=True):
        if rotated:
            here, there = here @ here.T, there @ there.T
        errors[place] = relative_error(here, there)
    return errors


def _added(streams: Mapping[str, F32]) -> dict[str, F32]:
    """What each place adds to the stream.  An earlier difference hardly shows in it."""
    values = list(streams.values())
    before = [np.zeros_like(values[0]), *values[:-1]]
    return {place: after - start for place, after, start in zip(streams, values, before, strict=True)}
