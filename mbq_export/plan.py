"""How large an export is, worked out from the model's config alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mbq_runtime.bundle.layout import NATIVE_LAYOUT, PORTABLE_LAYOUT
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from . import memory
from .format.nbits import packed_bits
from .methods import (
    CONTEXT_TOKENS,
    METHODS,
    MLP_HIDDEN,
    TUNE_GAINS,
    TUNE_ROUTED,
    TUNING_ROUTER_WINDOWS,
    Phase,
    held_back_windows,
)
from .model.shape import Decoder

SCALE_BYTES = {NATIVE_LAYOUT: 2, PORTABLE_LAYOUT: 8}
"""Bytes per group, by layout: an 8-bit scale and an 8-bit zero, or a float32 step and a float32 centre."""

ROW_SCALE_BYTES = {NATIVE_LAYOUT: 2, PORTABLE_LAYOUT: 4}
"""Bytes per row that a token reads, by layout: its float16 factor at a depth, or its float32 gain."""

_ROUTER_CASES = 14
"""Most ways to route a model that are compared side by side: four kinds at three budgets, and both ends."""

_MOST_MOMENT_WINDOWS = max(method.hessian_windows for method in METHODS.values())
"""Windows of text that second moments are measured on."""

_LIBRARIES_BYTES = 1 << 29
"""Memory of torch, transformers and TVM, and of their allocators.  Their mapped files do not count."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one export.

    decoder: the model; profile: slice widths; group_size: weights per scale; layout: how the target stores planes;
    router_kind: a kind of router, or "auto" while it is to be chosen; calib_tokens: tokens of text; kv_bits: bits of a
    cached key or value.
    """

    decoder: Decoder
    profile: SliceProfile
    group_size: int
    layout: str
    router_kind: str
    calib_tokens: int
    tunings: Collection[Phase] = (TUNE_GAINS,)
    """Every phase of tuning that slices may go through."""
    in_memory: bool = False
    """Whether the weights stay in memory however large they are.  Those on a GPU do, and those of a GGUF file, which
    are decoded into memory."""
    kv_bits: int = 32

    @property
    def router_bytes(self) -> int:
        """Size of the routers' parameters; of the largest kind while it is to be chosen."""
        steps = self.profile.depths - 1
        widths = self.decoder.router_widths().values()
        rules = len(widths) * 8 * steps
        if self.router_kind not in ("auto", "mlp"):
            return rules
        return rules + sum(MLP_HIDDEN * (2 * k + 4 + 4 * steps) for k in widths)

    @property
    def routed_parameters(self) -> int:
        """Number of weights that are sliced and routed."""
        return sum(n * k for n, k in self.decoder.unit_shapes().values())

    @property
    def read_parameters(self) -> int:
        """Number of routed weights that a token reads: of experts those that it takes."""
        return sum(n * k for n, k in self._read_shapes)

    @property
    def _read_shapes(self) -> Collection[tuple[int, int]]:
        # A graph of stock operators computes all experts.
        d, native = self.decoder, self.layout == NATIVE_LAYOUT
        return (d.read_shapes() if native else d.unit_shapes()).values()

    @property
    def parameters(self) -> int:
        """Number of weights: the routed ones, and the embedding where it is not the head.  Norms do not count."""
        return self.decoder.parameters

    def bytes_per_token(self, avg_bits: float) -> int:
        """Bytes of weights that one decoded token reads.

        Args:
            avg_bits: average bits per weight.
        """
        read, rows = self.read_parameters, sum(n for n, _ in self._read_shapes)
        scales = read * SCALE_BYTES[self.layout] // self.group_size
        scales += rows * ROW_SCALE_BYTES[self.layout]
        besides = self.router_bytes + self.decoder.chooser_bytes + self.per_layer_row_bytes
        return round(read * self.stored_bits(avg_bits) / 8) + scales + besides

    @property
    def per_layer_row_bytes(self) -> int:
        """Bytes of a token's row of the table of per-layer embeddings, which is read with all its slices."""
        width = self.decoder.per_layer_width
        scales = width * SCALE_BYTES[self.layout] // self.group_size + ROW_SCALE_BYTES[self.layout]
        return round(width * self.stored_bits(CODE_BITS) / 8) + scales if width else 0

    def stored_bits(self, avg_bits: float) -> float:
        """Bits read per weight: more than ``avg_bits`` where the layout pads its fields.

        Args:
            avg_bits: average bits per weight.
        """
        if self.layout == NATIVE_LAYOUT:
            return avg_bits
        stored, at = 0.0, 0
        for width in self.profile.slices:
            stored += packed_bits(width) * min(1.0, max(0.0, (avg_bits - at) / width))
            at += width
        return stored

    @property
    def disk_bytes(self) -> int:
        """Size of the bundle, to a few percent."""
        d = self.decoder
        per_weight = self.stored_bits(CODE_BITS) / 8 + SCALE_BYTES[self.layout] / self.group_size
        rows = sum(n for n, _ in d.unit_shapes().values())
        factors = rows * self.profile.depths * ROW_SCALE_BYTES[self.layout]
        of_kinds = {d.rotary_kind(layer): d.heads_of(layer).head_dim for layer in range(d.layers)}
        rotary = sum(size for kind, size in of_kinds.items() if kind is not None) * d.context_length * 4
        weights = round(self.parameters * per_weight) + factors + self.router_bytes + d.chooser_bytes
        return weights + rotary + (16 << 20)

    @property
    def weights_file_bytes(self) -> int:
        """Size of the file that holds the float32 weights during calibration; 0 where memory holds them."""
        return 0 if self.in_memory or 4 * self.parameters <= memory.KEPT_WEIGHT_BYTES else 4 * self.parameters

    @property
    def work_bytes(self) -> int:
        """Size of the files beside the first output: float32 weights, finished slices, and packed experts."""
        sliced = self.routed_parameters + self.decoder.per_layer_width * self.decoder.vocab_size
        slices = round(sliced * (1 + SCALE_BYTES[NATIVE_LAYOUT] / self.group_size))
        return self.weights_file_bytes + slices + self.packed_experts_bytes

    @property
    def packed_experts_bytes(self) -> int:
        """Size of the files in which packed matrices of experts wait until they are written."""
        d = self.decoder
        share = sum(n * k * count for (role, (n, k)), count in d.shape_counts.items() if role.startswith("experts"))
        return self.disk_bytes * share // self.parameters

    @property
    def peak_memory_bytes(self) -> int:
        """Most memory that the export holds at once, to about a fifth."""
        return max(memory_by_stage(self).values())


def memory_by_stage(plan: Plan) -> dict[str, int]:
    """Bytes that each large stage holds, the libraries included.

    Mapped files do not count, because the system takes them out of memory when it needs to.  Finished slices are
    in such a file, and so are the weights of a large model.

    Args:
        plan: the sizes of the export.
    """
    d, tokens, fast = plan.decoder, CONTEXT_TOKENS, memory.fast_bytes()
    shapes, depths = list(d.role_shapes.values()), plan.profile.depths
    block, head = sum(n * k for n, k in shapes), d.vocab_size * d.hidden_size
    largest, widest = max(n * k for n, k in shapes), max(k for _, k in shapes)
    weight_bytes = 0 if plan.weights_file_bytes else 4
    measured = held_back_windows(plan.calib_tokens // tokens) // 2 * tokens
    # The original's head and its inputs on the held-back text are kept to the end, to measure against.
    kept_original = 4 * head + 4 * measured * d.hidden_size
    before = _LIBRARIES_BYTES + kept_original + weight_bytes * plan.parameters + (4 * head if d.tied else 0)
    # A GPU has no mapped files: codes are in its memory.
    after = _LIBRARIES_BYTES + kept_original + weight_bytes * head + (plan.routed_parameters if plan.in_memory else 0)
    # Slicing holds each weight once for each depth, and once as it was.
    streams = 4 * (depths + 1)

    # A backward pass keeps activations, fast copies of weights, and logits with their gradients.
    kept, in_use, logits = memory.activation_bytes(d), plan.routed_parameters, tokens * d.vocab_size
    # Inputs of every layer and their gradients.  Where all activations are kept, they are among these.
    seen = 0
    if kept > memory.KEPT_ACTIVATION_BYTES:
        kept, in_use = kept // d.layers + 4 * tokens * d.layers * d.hidden_size, block + head
        of_blocks = sum((n + k) * count for (_, (n, k)), count in d.token_counts.items())
        seen = 4 * tokens * (of_blocks + d.vocab_size + d.hidden_size)

    # Scales and offsets before and after tuning, their gradients, and Adam's two moments.
    tuned = 2 * 4 * 5 * (plan.routed_parameters // plan.group_size)
    if plan.tunings:
        # Slices are chosen from the weights again.
        tuned += weight_bytes * plan.routed_parameters
    if TUNE_ROUTED in plan.tunings:
        # Routers read the inputs of norms.
        tuned += 2 * 4 * tokens * d.layers * d.hidden_size
    windows = max((phase.windows_per_step for phase in plan.tunings), default=0)
    teacher = fast * head + 2 * plan.calib_tokens * d.hidden_size
    # Weights that are in memory are cast once.
    casts = fast * plan.parameters if weight_bytes and fast < 4 else 0
    inputs, for_tuning = (
        min(memory.router_input_bytes(d, of), memory.ROUTER_INPUT_BYTES)
        for of in (measured, TUNING_ROUTER_WINDOWS * tokens)
    )
    expert_inputs, token_weights = _expert_bytes(plan)
    measuring = after + kept + seen + 4 * head + 4 * (depths + 4) * logits
    return {
        # Rotations are computed in float64.
        "rotating": before + 4 * 8 * min(max(largest, head), memory.WEIGHTS_AT_ONCE),
        "recording teacher outputs": before + casts + (teacher if plan.tunings else 0),
        "computing token weights": before + token_weights + kept * fast // 4 + fast * in_use + 20 * logits,
        # Second moments of the inputs, and of one layer three copies to invert them, and then their factor.
        "slicing": before + token_weights + expert_inputs + 4 * sum(k * k for _, k in shapes)
        + max(3 * 8 * widest**2, 4 * widest**2 + streams * min(largest, memory.WEIGHTS_AT_ONCE)),
        "slicing the head": before + streams * min(head, memory.WEIGHTS_AT_ONCE),
        "rounding tables": before + memory.ROUNDING_BYTES + d.per_layer_width * d.vocab_size,
        "tuning": after + tuned + teacher + windows * (kept * fast // 4 + 3 * fast * logits) + 2 * fast * head
        if plan.tunings else 0,
        "fitting routers for tuning": measuring + teacher + for_tuning if TUNE_ROUTED in plan.tunings else 0,
        "measuring slice gains": measuring + inputs,
        # Weights of a block at every depth or of the head at one, and the residual stream of every case.
        "comparing routers": after + inputs + 4 * max(depths * block, head) + 3 * 4 * logits
        + 4 * _ROUTER_CASES * measured * d.carried_size,
        # Packed experts wait in files; of one unit codes, planes and scales are in memory.
        "writing": _LIBRARIES_BYTES + plan.disk_bytes - plan.packed_experts_bytes + 4 * max(largest, head),
    }  # fmt: skip


def _expert_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of the inputs of a block's experts, and of the weights of tokens in all layers of experts.

    Second moments are computed of one expert at a time, from the inputs of all.
    """
    d, tokens = plan.decoder, min(plan.calib_tokens, _MOST_MOMENT_WINDOWS * CONTEXT_TOKENS)
    blocks = d.layers_of("experts_in")
    if d.experts is None or not blocks:
        return 0, 0
    pairs = sum(d.of_token(role, d.role_shapes[role])[1] for role in ("experts_in", "experts_out"))
    layers = 3 * d.experts.count * blocks
    return memory.fast_bytes() * pairs * tokens, 4 * layers * tokens if plan.tunings else 0


def depth_budgets(profile: SliceProfile) -> list[float]:
    """Average bits that sizes are stated at: whole and half bits of the profile's range.

    Args:
        profile: slice widths.
    """
    steps = range(2 * profile.min_bits, 2 * CODE_BITS + 1)
    return [step / 2 for step in steps]
