"""Lowers a calibrated decoder to kernels and a plan of launches for a GPU.

The whole step runs on the device.  The plan has three programs: ``prompt`` takes a chunk of a prompt and ``token``
one token, both up to the last block; ``choose`` follows either and chooses the next token (final norm, head, largest
logit).  ``mbq_targets.gpu`` has the kernels.

An activation is the name of a scratch buffer::

    residual   the stream                        branch    output of attention or MLP
    normed     result of a norm                  attended  attended values
    stacked    q, k and v, or gate and up        gated     product of gate and up
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.gpu_plan import LOGITS, RESULT, ROUTING, STATE
from mbq_runtime.bundle.layout import ROW_BLOCK
from mbq_runtime.errors import ModelError
from mbq_targets.gpu import attention as attention_kernels
from mbq_targets.gpu import matmul, routing, sampling
from mbq_targets.gpu.kernel import MAX_TABLES, TOKENS
from mbq_targets.machines import Gpu, Target

from ..calibrated import Calibrated, HeadInput, RoutedLinear
from ..format.codes import Sliced
from ..format.planes import pack_scales, pack_slices
from ..format.router import RouterParams
from ..model.checkpoint import Checkpoint
from .builder import Attention, Builder, Convolution, Delta, Embedding, ExpertsStep, Gate, Norm, PerLayer
from .decoder import in_engine_order, walk_blocks, walk_head
from .gpu_launches import Array, Launches

_PRODUCTS = {"normed": "stacked", "attended": "branch", "gated": "branch"}
"""The buffer of a linear layer's product, by the buffer of its input."""

_ROTATE_THREADS = 32


class Lowered(NamedTuple):
    """A decoder for a GPU.

    plan: contents of plan.json; texts: kernels by file name; tensors: by name; places: where each starts in the
    weights' file, in bytes, in order; depths: the first depth that reads a tensor, 1 where it is not named.
    """

    plan: dict[str, Any]
    texts: dict[str, str]
    tensors: dict[str, Array]
    places: dict[str, int]
    depths: dict[str, int]


def lower(checkpoint: Checkpoint, calibrated: Calibrated, target: Target) -> Lowered:
    """Lower a decoder to a GPU's language.

    Args:
        checkpoint: norms, rotations and shape of the model.
        calibrated: its slices and routers.
        target: a machine with a GPU.

    Returns:
        The plan, the kernels, the tensors and their places.

    Raises:
        BuildError: a kernel cannot be translated to the target's language.
        ModelError: the routers have more tables of thresholds than the kernels take.
    """
    gpu, d = target.gpu, checkpoint.decoder
    assert gpu is not None
    calibrated = in_engine_order(checkpoint, calibrated)
    chunk, launches = gpu.work_groups.chunk, Launches(calibrated.profile.depths)
    for name, numbers in (
        (STATE, TOKENS + chunk), (RESULT, 2), (ROUTING, 2 * chunk), ("order", chunk), (LOGITS, d.vocab_size)
    ):  # fmt: skip
        launches.scratch(name, numbers)
    launches.begin("prompt")
    walk_blocks(d, calibrated, GpuBuilder(checkpoint, calibrated, gpu, launches, tokens=chunk))
    launches.begin("token")
    one_token = GpuBuilder(checkpoint, calibrated, gpu, launches, tokens=1)
    stream = walk_blocks(d, calibrated, one_token)
    launches.begin("choose")
    walk_head(d, calibrated, one_token, stream)
    head_share = calibrated.units[d.head.name].parameters / one_token.routed_parameters
    plan, texts = launches.plan(gpu.dialect, chunk=chunk, vocab_size=d.vocab_size, head_share=head_share)
    return Lowered(plan, texts, launches.tensors, launches.places(), launches.first_depths)


class GpuBuilder(Builder[str]):
    """Records the launches of one program.

    Args:
        checkpoint: norms, rotations and shape of the model.
        calibrated: its slices and routers.
        gpu: language and work-group shapes of the device.
        launches: where launches are recorded.
        tokens: of one pass.
    """

    def __init__(
        self, checkpoint: Checkpoint, calibrated: Calibrated, gpu: Gpu, launches: Launches, *, tokens: int
    ) -> None:
        self.checkpoint, self.decoder = checkpoint, checkpoint.decoder
        self.work_groups, self.launches, self.tokens = gpu.work_groups, launches, tokens
        self.profile, self.group_size = calibrated.profile, calibrated.group_size
        self.routed_parameters = sum(linear.parameters for linear in calibrated.units.values())

    def embed(self, embedding: Embedding) -> str:
        d, group = self.decoder, self.group_size
        buffers = self._matrix(embedding.name, embedding.table)
        x = self.launches.scratch("residual", self.tokens * d.hidden_size)
        # One row's planes, and its share of the scales of a row block with the factors of one depth.
        row_bytes = d.hidden_size + matmul.scale_words(ROW_BLOCK, d.hidden_size, group, 1) * 4 // ROW_BLOCK
        factors = embedding.factors
        scaled = factors is not None and bool((factors != 1).any())
        if factors is not None and scaled:
            buffers["factors"] = self.launches.tensor("embedding.factors", factors)
            row_bytes += factors.nbytes
        kernel = matmul.gather(
            f"gather_{self.tokens}", matmul.MatrixShape(d.vocab_size, d.hidden_size, group, self.profile),
            self.work_groups.token_threads, self.tokens, scaled=scaled,
        )  # fmt: skip
        self.launches.launch(kernel, {**buffers, "x": x}, row_bytes)
        return x

    def norm(self, residual: str, branch: str | None, norm: Norm, feeds: RoutedLinear) -> tuple[str, str]:
        return self._routed_norm(residual, branch, norm, feeds, last=False)

    def add(self, residual: str, branch: str | None, name: str, feeds: RoutedLinear) -> tuple[str, str]:
        # The sum is also put where a norm would put its result: products take their inputs from there.
        return self._routed_norm(residual, branch, None, feeds, last=False)

    def post_norm(self, branch: str, norm: Norm) -> str:
        k, tokens, threads = self.decoder.hidden_size, self.tokens, self.work_groups.token_threads
        kernel = routing.plain_norm(f"post_norm_{tokens}", k, self.decoder.norm_eps, threads, tokens)
        weight = self.launches.tensor(norm.source, self.checkpoint.norm(norm.source))
        self.launches.launch(kernel, {"x": branch, "weight": weight}, 4 * k)
        return branch

    def linear(self, linear: RoutedLinear, x: str, routed_by: str) -> str:
        return self._linear(linear, x, _PRODUCTS[x])

    def attention(self, attention: Attention, qkv: str, feeds: RoutedLinear) -> str:
        d, tokens = self.decoder, self.tokens
        if attention.gates:
            raise ModelError(f"{attention.name}: gates of heads have no GPU kernel; export for a processor's target")
        rotary, rotated = f"{attention.rotary}.rotary", 0
        if attention.rotary is not None:
            if rotary not in self.launches.tensors:
                self.launches.tensor(rotary, np.concatenate(self.checkpoint.rotary(attention.rotary), axis=1))
            rotated = self.launches.tensors[rotary].shape[1]
        heads = attention_kernels.Heads(d.heads, d.kv_heads, d.head_dim, rotated)
        q = self.launches.scratch("q", tokens * d.heads * d.head_dim)
        token_bytes = 4 * d.kv_heads * d.head_dim
        cache = {part: self.launches.cache(f"{part}.{attention.layer}", token_bytes) for part in ("keys", "values")}
        buffers = {"qkv": qkv, **({"rotary": rotary} if rotated else {}), "q": q, **cache}
        head_norm, norms = None, attention.head_norms
        if norms is not None:
            head_norm = attention_kernels.HeadNorm(d.norm_eps, norms.whole_row, norms.rotated_first)
            gains = np.concatenate([self.checkpoint.norm(norm.source) for norm in (norms.q, norms.k)])
            gains = gains.reshape(-1, d.head_dim)
            buffers["norms"] = self.launches.tensor(f"layers.{attention.layer}.head_norms", gains)
        if attention.grows and (growth := self.checkpoint.query_growth()) is not None:
            buffers["growth"] = self.launches.tensor("query_growth", growth)
        rotate = attention_kernels.rotate(
            f"rotate_{tokens}{'' if rotated else '_still'}", heads, tokens, _ROTATE_THREADS,
            norm=head_norm, grows=attention.grows,
        )  # fmt: skip
        self.launches.launch(rotate, buffers, 4 * rotated)
        name = f"attend_{tokens}{'' if attention.window is None else f'_window_{attention.window}'}"
        y = self.launches.scratch("attended", tokens * d.heads * d.head_dim)
        attend = attention_kernels.attend(
            name, heads, tokens, self.work_groups.attention_threads,
            scale=attention.scale, window=attention.window, cap=attention.cap,
        )  # fmt: skip
        self.launches.launch(attend, {"q": q, "y": y, **cache})
        k = d.heads * d.head_dim
        router, router_buffers, size = self._router(feeds)
        route = routing.route(f"route_{tokens}", k, self.work_groups.token_threads, tokens, router)
        self.launches.launch(route, {"x": y, **router_buffers}, size)
        return y

    def convolution(self, convolution: Convolution, stacked: str, feeds: RoutedLinear) -> str:
        raise ModelError(f"{convolution.name}: a short convolution has no GPU kernel; export for a processor's target")

    def delta(self, delta: Delta, stacked: str, feeds: RoutedLinear) -> str:
        raise ModelError(f"{delta.name}: a delta net has no GPU kernel; export for a processor's target")

    def experts(self, experts: ExpertsStep, layers: tuple[RoutedLinear, RoutedLinear], x: str, routed_by: str) -> str:
        raise ModelError(f"{experts.name}: experts have no GPU kernel; export for a processor's target")

    def per_layer(self, per_layer: PerLayer, gate: str, given: str, rows: str) -> str:
        raise ModelError(f"{per_layer.name}: per-layer embeddings have no GPU kernel; export for a processor's target")

    def scale(self, residual: str, branch: str, name: str, source: str) -> str:
        raise ModelError(f"{source}: scalars of layers have no GPU kernel; export for a processor's target")

    def gate(self, gate: Gate, stacked: str, feeds: RoutedLinear) -> str:
        d, tokens = self.decoder, self.tokens
        router, buffers, size = self._router(feeds)
        y = self.launches.scratch("gated", tokens * d.ffn_size)
        kernel = routing.gate(
            f"gate_{tokens}",
            d.ffn_size,
            self.work_groups.token_threads,
            tokens,
            activation=gate.activation,
            router=router,
        )
        self.launches.launch(kernel, {"stacked": stacked, "y": y, **buffers}, size)
        return y

    def final_norm(self, residual: str, branch: str | None, norm: Norm, feeds: RoutedLinear) -> tuple[str, str]:
        return self._routed_norm(residual, branch, norm, feeds, last=True)

    def head_input(self, turn: HeadInput, x: str) -> str:
        a, b, threads = len(turn.left), len(turn.right), self.work_groups.token_threads
        y = self.launches.scratch("turned", a * b)
        gain = self.launches.tensor("head_input.gain", turn.gain)
        steps: tuple[tuple[str, str, NDArray[np.float32], dict[str, str]], ...] = (
            ("left", "left", turn.left, {}),
            ("right_gain", "right", turn.right.T, {"gain": gain}),
            ("left", "left_back", turn.left.T, {}),
            ("right", "right_back", turn.right, {}),
        )
        for kind, name, factor, more in steps:
            kernel = sampling.turn(f"turn_{kind}", a, b, kind.partition("_")[0], threads, gain=bool(more))
            buffers = {"x": x, "factor": self.launches.tensor(f"head_input.{name}", factor), "y": y}
            self.launches.launch(kernel, buffers | more, factor.nbytes)
            x, y = y, x
        return x

    def logits(self, head: RoutedLinear, x: str, routed_by: str) -> str:
        """The logits of one token, and the largest of them, which is the next token.

        Args:
            head: slices and router of the head.
            x: input of the head.
            routed_by: not used, ``final_norm`` has run the router.

        Returns:
            The buffer of the logits.
        """
        logits = self._linear(head, x, LOGITS)
        groups = self.work_groups
        if self.decoder.logits_cap is not None:
            kernel = sampling.cap("cap", self.decoder.vocab_size, groups.token_threads, self.decoder.logits_cap)
            self.launches.launch(kernel, {"logits": logits})
        kernel = sampling.argmax("argmax", self.decoder.vocab_size, groups.token_threads, groups.chunk)
        self.launches.launch(kernel, {"logits": logits, "result": RESULT})
        return logits

    def _matrix(self, name: str, sliced: Sliced) -> dict[str, str]:
        """Buffers of a matrix; a tied table is stored once."""
        planes, scales = f"{name}.planes", f"{name}.scales"
        if scales not in self.launches.tensors:
            self.launches.tensor(scales, pack_scales(sliced))
            self.launches.sliced(planes, pack_slices(sliced.codes, self.profile))
        return {"planes": planes, "scales": scales}

    def _routed_norm(
        self, residual: str, branch: str | None, norm: Norm | None, feeds: RoutedLinear, *, last: bool
    ) -> tuple[str, str]:
        """A norm, or a sum alone, and the router behind it.  last: of one token, which ``state`` names, in a chunk."""
        k, tokens = self.decoder.hidden_size, self.work_groups.chunk if last else self.tokens
        router, buffers, size = self._router(feeds)
        y = self.launches.scratch("normed", k if last else tokens * k)
        kernel = routing.norm(
            f"{'sum' if norm is None else 'norm'}_{'last' if last else tokens}{'_first' * (branch is None)}",
            k, self.decoder.norm_eps, self.work_groups.token_threads, tokens,
            branch=branch is not None, router=router, last=last, normed=norm is not None,
        )  # fmt: skip
        buffers["residual"] = residual
        if norm is not None:
            buffers["weight"] = self.launches.tensor(norm.source, self.checkpoint.norm(norm.source))
        buffers["y"] = y
        if branch is not None:
            buffers["branch"] = branch
        self.launches.launch(kernel, buffers, size + 4 * k)
        return y, residual

    def _router(self, linear: RoutedLinear) -> tuple[routing.RouterShape, dict[str, str], int]:
        """A router's shape, its buffers and their bytes."""
        router, name = _widened(linear.router), f"{linear.unit.name}.router"
        shape = routing.RouterShape(self.profile, 0 if router.w1 is None else len(router.w1))
        table = self.launches.table(np.stack([router.budgets, router.thresholds]))
        if table >= MAX_TABLES:
            raise ModelError(
                f"{linear.unit.name}: its table of thresholds is number {table + 1}, GPU kernels take {MAX_TABLES}; "
                "export for a processor's target"
            )
        packed = shape.pack(
            linear.parameters / self.routed_parameters, table, router.bias, router.norm_gain,
            b1=router.b1, w2=router.w2,
        )  # fmt: skip
        buffers = {"parameters": self.launches.tensor(f"{name}.parameters", packed)}
        if router.w1 is not None:
            buffers["w1"] = self.launches.tensor(f"{name}.w1", routing.pack_w1(router.w1))
        w1_bytes = 2 * shape.hidden * linear.sliced.codes.shape[1]
        return shape, buffers, packed.nbytes + w1_bytes

    def _linear(self, linear: RoutedLinear, x: str, y: str) -> str:
        """One product by depths that are known; ``y`` is the name of its buffer."""
        n, k = linear.sliced.codes.shape
        bias, tokens = linear.bias is not None, self.tokens
        self.launches.scratch(y, tokens * n)
        if tokens > 1:
            self.launches.launch(routing.order(f"order_{tokens}", tokens), {})
        matrix = matmul.MatrixShape(n, k, self.group_size, self.profile)
        kernel = matmul.matmul(f"matmul_{n}x{k}_{tokens}{'_bias' * bias}", matrix, self.work_groups, tokens, bias=bias)
        buffers = {"x": x, "y": y, **self._matrix(linear.unit.name, linear.sliced)}
        if linear.bias is not None:
            buffers["bias"] = self.launches.tensor(f"{linear.unit.name}.bias", linear.bias)
        depths = range(1, self.profile.depths + 1)
        sizes = [matmul.weight_bytes(matrix, depth) + 4 * n * bias for depth in depths]
        self.launches.launch(kernel, buffers, sizes)
        return y


def _widened(router: RouterParams) -> RouterParams:
    """A learned router as wide as the kernels load it: rows of zeros add nothing to a score."""
    if router.w1 is None or router.b1 is None or router.w2 is None:
        return router
    more = -len(router.w1) % routing.LEARNED_STEP
    w1 = np.pad(router.w1, ((0, more), (0, 0)))
    return replace(router, w1=w1, b1=np.pad(router.b1, (0, more)), w2=np.pad(router.w2, ((0, 0), (0, more))))
