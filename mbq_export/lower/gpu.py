"""A calibrated decoder as kernels and a plan of launches: what a bundle for a GPU holds.

The whole step runs on the device.  A pass over a prompt's chunk and one over a single token are the same
launches with other kernels; the choice of a token (last norm, head, largest logit) follows either.  See
``mbq_runtime.bundle.gpu_plan`` for what the plan says and ``mbq_targets.gpu`` for the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle import gpu_plan
from mbq_runtime.bundle.gpu_plan import LOGITS, RESULT, ROUTING, STATE
from mbq_runtime.errors import ModelError
from mbq_targets.gpu import attention, matmul, routing, sampling
from mbq_targets.gpu.kernel import MAX_TABLES, TOKENS, Kernel
from mbq_targets.gpu.source import lower as to_text
from mbq_targets.machines import Target

from ..calibrate import Calibrated, RoutedLinear
from ..format.codes import Sliced
from ..format.planes import pack_planes, pack_scales
from ..format.router import RouterParams
from ..model.checkpoint import Checkpoint

Array = NDArray[np.generic]

PAGE_BYTES = 4096
SUFFIX = {"opencl": ".cl", "wgsl": ".wgsl"}


class _Lowering:
    def __init__(self, checkpoint: Checkpoint, calibrated: Calibrated, target: Target) -> None:
        assert target.gpu is not None
        self.checkpoint, self.decoder, self.calibrated = checkpoint, checkpoint.decoder, calibrated
        self.dialect, self.tuning = target.gpu.dialect, target.gpu.tuning
        self.profile, self.group = calibrated.profile, calibrated.group_size
        self.kernels: dict[str, Kernel] = {}
        self.tensors: dict[str, Array] = {}
        self.scratch: dict[str, int] = {}  # float32 or int32 numbers
        self.caches: dict[str, int] = {}  # bytes for each token of context
        self.programs: dict[str, list[tuple[Kernel, dict[str, str], list[int]]]] = {}
        self.launches: list[tuple[Kernel, dict[str, str], list[int]]] = []
        self.tables: list[NDArray[np.float32]] = []
        self.parameters = sum(linear.parameters for linear in calibrated.units.values())

    def build(self) -> None:
        d, chunk = self.decoder, self.tuning.chunk
        self.scratch |= {STATE: TOKENS + chunk, RESULT: 2, ROUTING: 2 * chunk, "order": chunk, LOGITS: d.vocab_size}
        for name, tokens in (("prompt", chunk), ("token", 1)):
            self.programs[name] = self.launches = []
            self._blocks(tokens)
        self.programs["choose"] = self.launches = []
        self._choose()

    def _tensor(self, name: str, value: Array) -> str:
        self.tensors.setdefault(name, np.ascontiguousarray(value))
        return name

    def _room(self, name: str, numbers: int) -> str:
        """Scratch memory on the device; the largest that is asked for."""
        self.scratch[name] = max(self.scratch.get(name, 0), numbers)
        return name

    def _launch(self, kernel: Kernel, buffers: dict[str, str], weight_bytes: int | list[int] = 0) -> None:
        kernel = self.kernels.setdefault(kernel.name, kernel)
        by_depth = weight_bytes if isinstance(weight_bytes, list) else [weight_bytes] * self.profile.depths
        self.launches.append((kernel, {"state": STATE, "routing": ROUTING, "order": "order", **buffers}, by_depth))

    def _matrix(self, name: str, sliced: Sliced) -> dict[str, str]:
        if f"{name}.planes" not in self.tensors:
            self._tensor(f"{name}.planes", pack_planes(sliced.codes, self.profile))
            self._tensor(f"{name}.scales", matmul.pair_scales(pack_scales(sliced.scale, sliced.offset)))
        return {"planes": f"{name}.planes", "scales": f"{name}.scales"}

    def _blocks(self, tokens: int) -> None:
        """The residual stream of ``tokens`` tokens, up to what the last block adds to it."""
        d, group = self.decoder, self.group
        own = self.calibrated.embedding
        table = self._matrix("head", self.calibrated.units["head"].sliced) if own is None else (
            self._matrix("embedding", own)
        )  # fmt: skip
        self._room("residual", tokens * d.hidden_size)
        factors = self.calibrated.embedding_factors(d)
        scaled = bool((factors != 1).any())
        if scaled:
            table["factors"] = self._tensor("embedding.factors", factors)
        kernel = matmul.gather(
            f"gather_{tokens}",
            d.vocab_size,
            d.hidden_size,
            group,
            self.profile,
            self.tuning.token_threads,
            tokens,
            scaled,
        )
        row_bytes = matmul.scale_words(16, d.hidden_size, group) * 4 // 16 + d.hidden_size
        self._launch(kernel, {**table, "x": "residual"}, row_bytes + factors.nbytes * scaled)
        for layer in range(d.layers):
            units = {role: self.calibrated.units[unit.name] for role, unit in d.layer_units(layer).items()}
            for part, first in (("attn", layer == 0), ("mlp", False)):
                self._norm(units[f"{part}_in"], d.input_norm(layer, f"{part}_in"), tokens, branch=not first)
                self._linear(units[f"{part}_in"], "normed", "stacked", tokens)
                inner = self._attention if part == "attn" else self._gate
                self._linear(units[f"{part}_out"], inner(layer, units[f"{part}_out"], tokens), "branch", tokens)
                self._post_norm(d.output_norm(layer, f"{part}_out"), tokens)

    def _choose(self) -> None:
        d, chunk = self.decoder, self.tuning.chunk
        head = self.calibrated.units["head"]
        self._norm(head, d.final_norm, chunk, branch=True, last=True)
        self._linear(head, self._head_input(), LOGITS, 1)
        kernel = sampling.argmax("argmax", d.vocab_size, self.tuning.token_threads, chunk)
        self._launch(kernel, {"logits": LOGITS, "result": RESULT})

    def _head_input(self) -> str:
        turn = self.calibrated.head_input
        if turn is None:
            return "normed"
        a, b, threads = len(turn.left), len(turn.right), self.tuning.token_threads
        self._room("turned", a * b)
        gain = self._tensor("head_input.gain", turn.gain)
        steps: tuple[tuple[str, str, NDArray[np.float32], dict[str, str]], ...] = (
            ("left", "left", turn.left, {}),
            ("right_gain", "right", turn.right.T, {"gain": gain}),
            ("left", "left_back", turn.left.T, {}),
            ("right", "right_back", turn.right, {}),
        )
        rooms = ("normed", "turned")
        for i, (kind, name, factor, more) in enumerate(steps):
            side = kind.partition("_")[0]
            kernel = sampling.turn(f"turn_{kind}", a, b, side, threads, gain=bool(more))
            buffers = {"x": rooms[i % 2], "factor": self._tensor(f"head_input.{name}", factor), "y": rooms[1 - i % 2]}
            self._launch(kernel, buffers | more, factor.nbytes)
        return "normed"

    def _router(self, linear: RoutedLinear, k: int) -> tuple[routing.RouterShape, dict[str, str], int]:
        """Its shape, its buffers and their bytes."""
        router, name = _widened(linear.router), f"{linear.unit.name}.router"
        shape = routing.RouterShape(self.profile, 0 if router.w1 is None else len(router.w1))
        table = np.stack([router.budgets, router.thresholds])
        number = next((i for i, seen in enumerate(self.tables) if np.array_equal(seen, table)), len(self.tables))
        if number == len(self.tables):
            self.tables.append(table)
        if number >= MAX_TABLES:
            raise ModelError(
                f"{linear.unit.name}: more than {MAX_TABLES} tables of thresholds have no lowering to GPUs"
            )
        packed = shape.pack(
            linear.parameters / self.parameters, number, router.bias, router.norm_gain, router.b1, router.w2
        )
        buffers = {"parameters": self._tensor(f"{name}.parameters", packed)}
        if router.w1 is not None:
            buffers["w1"] = self._tensor(f"{name}.w1", routing.pack_w1(router.w1))
        return shape, buffers, packed.nbytes + 2 * shape.hidden * k

    def _norm(self, linear: RoutedLinear, source: str, tokens: int, *, branch: bool, last: bool = False) -> None:
        k = self.decoder.hidden_size
        shape, buffers, size = self._router(linear, k)
        self._room("normed", k if last else tokens * k)
        name = f"norm_{'last' if last else tokens}{'_first' * (not branch)}"
        kernel = routing.norm(
            name, k, self.decoder.norm_eps, self.tuning.token_threads, tokens, branch=branch, router=shape, last=last
        )
        weight = self._tensor(source, self.checkpoint.norm(source))
        buffers |= {"residual": "residual", "branch": "branch", "weight": weight, "y": "normed"}
        self._launch(kernel, buffers, size + 4 * k)

    def _post_norm(self, source: str | None, tokens: int) -> None:
        if source is None:
            return
        k = self.decoder.hidden_size
        kernel = routing.plain_norm(f"post_norm_{tokens}", k, self.decoder.norm_eps, self.tuning.token_threads, tokens)
        weight = self._tensor(source, self.checkpoint.norm(source))
        self._launch(kernel, {"x": "branch", "weight": weight}, 4 * k)

    def _linear(self, linear: RoutedLinear, x: str, y: str, tokens: int) -> None:
        n, k = linear.sliced.codes.shape
        bias = linear.bias is not None
        self._room(y, tokens * n)
        if tokens > 1:
            self._launch(routing.order(f"order_{tokens}", tokens), {})
        kernel = matmul.matmul(
            f"matmul_{n}x{k}_{tokens}{'_bias' * bias}", n, k, self.group, self.profile, self.tuning, tokens, bias
        )
        buffers = {"x": x, "y": y, **self._matrix(linear.unit.name, linear.sliced)}
        if linear.bias is not None:
            buffers["bias"] = self._tensor(f"{linear.unit.name}.bias", linear.bias)
        depths = range(1, self.profile.depths + 1)
        sizes = [matmul.weight_bytes(n, k, self.group, self.profile, depth) + 4 * n * bias for depth in depths]
        self._launch(kernel, buffers, sizes)

    def _attention(self, layer: int, out: RoutedLinear, tokens: int) -> str:
        d, threads = self.decoder, self.tuning.attention_threads
        kind = d.rotary_kind(layer)
        if f"{kind}.rotary" not in self.tensors:
            self._tensor(f"{kind}.rotary", np.concatenate(self.checkpoint.rotary(kind), axis=1))
        rotated = self.tensors[f"{kind}.rotary"].shape[1]
        shape = attention.Heads(d.heads, d.kv_heads, d.head_dim, rotated)
        q = self._room("q", tokens * d.heads * d.head_dim)
        cache = {part: f"{part}.{layer}" for part in ("keys", "values")}
        self.caches |= dict.fromkeys(cache.values(), 4 * d.kv_heads * d.head_dim)
        rotary = {"qkv": "stacked", "rotary": f"{kind}.rotary", "q": q, **cache}
        eps = None
        if d.family.qk_norm:
            eps = d.norm_eps
            norms = np.stack([self.checkpoint.norm(d.head_norm(layer, part)) for part in "qk"])
            rotary["norms"] = self._tensor(f"layers.{layer}.head_norms", norms)
        self._launch(attention.rotate(f"rotate_{tokens}", shape, tokens, 32, eps), rotary, 4 * rotated)
        window = d.window(layer)
        name = f"attend_{tokens}{'' if window is None else f'_window_{window}'}"
        y = self._room("attended", tokens * d.heads * d.head_dim)
        kernel = attention.attend(name, shape, d.attention_scale, window, tokens, threads)
        self._launch(kernel, {"q": q, "y": y, **cache})
        k = out.sliced.codes.shape[1]
        router, buffers, size = self._router(out, k)
        self._launch(
            routing.route(f"route_{tokens}", k, self.tuning.token_threads, tokens, router), {"x": y, **buffers}, size
        )
        return y

    def _gate(self, layer: int, out: RoutedLinear, tokens: int) -> str:
        d = self.decoder
        router, buffers, size = self._router(out, d.ffn_size)
        y = self._room("gated", tokens * d.ffn_size)
        kernel = routing.gate(f"gate_{tokens}", d.ffn_size, d.activation, self.tuning.token_threads, tokens, router)
        self._launch(kernel, {"stacked": "stacked", "y": y, **buffers}, size)
        return y


def _widened(router: RouterParams) -> RouterParams:
    """A learned router as wide as the kernels load it: rows of zeros add nothing to a score."""
    if router.w1 is None or router.b1 is None or router.w2 is None:
        return router
    more = -len(router.w1) % routing.LEARNED_STEP
    w1 = np.pad(router.w1, ((0, more), (0, 0)))
    return replace(router, w1=w1, b1=np.pad(router.b1, (0, more)), w2=np.pad(router.w2, ((0, 0), (0, more))))


def lower(
    checkpoint: Checkpoint, calibrated: Calibrated, target: Target
) -> tuple[dict[str, Any], dict[str, str], dict[str, Array]]:
    """The plan (contents of plan.json), the kernels' texts by file name, the tensors by name in the file's order.

    Raises BuildError when a kernel cannot be lowered to the target's dialect.
    """
    lowering = _Lowering(checkpoint, calibrated, target)
    lowering.build()
    sources = to_text(list(lowering.kernels.values()), lowering.dialect)
    files = {name: f"{name}{SUFFIX[lowering.dialect]}" for name in sources}
    buffers = {name: {"bytes": 4 * numbers, "offset": -1} for name, numbers in lowering.scratch.items()}
    buffers |= {name: {"bytes": size, "offset": -2} for name, size in lowering.caches.items()}
    offset = 0
    for name, tensor in lowering.tensors.items():
        buffers[name] = {"bytes": tensor.nbytes, "offset": offset}
        offset = _next_page(offset + tensor.nbytes)
    needs = gpu_plan.Needs(
        buffer_bytes=max(b["bytes"] for b in buffers.values()),
        group_items=max(kernel.threads for kernel in lowering.kernels.values()),
        local_bytes=max(source.local_bytes for source in sources.values()),
        bindings=max(len(source.arguments) for source in sources.values()),
    )
    head = calibrated.units["head"].parameters
    plan = {
        "dialect": lowering.dialect,
        "chunk": lowering.tuning.chunk,
        "vocab_size": checkpoint.decoder.vocab_size,
        "head_share": head / lowering.parameters,
        "tables": [{"budgets": t[0].tolist(), "thresholds": t[1].tolist()} for t in lowering.tables],
        "needs": asdict(needs),
        "kernels": {
            name: {
                "file": files[name],
                "arguments": list(source.arguments),
                "items": lowering.kernels[name].threads,
                "local_bytes": source.local_bytes,
            }
            for name, source in sources.items()
        },
        "buffers": buffers,
        "programs": {
            name: [
                _launch_document(kernel, bound, sizes, sources[kernel.name].arguments)
                for kernel, bound, sizes in launches
            ]
            for name, launches in lowering.programs.items()
        },
    }
    return plan, {files[name]: source.text for name, source in sources.items()}, lowering.tensors


def _next_page(offset: int) -> int:
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


def _launch_document(
    kernel: Kernel, bound: Mapping[str, str], weight_bytes: list[int], arguments: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "kernel": kernel.name,
        "grid": list(kernel.grid),
        "buffers": [bound[name] for name in arguments],
        "weight_bytes": weight_bytes,
    }
