"""A device for tests: for torch and its callers, its tensors are not on the processor.

The numbers are in a CPU tensor inside.  As a GPU would, the device refuses to hand them to numpy, and to mix with CPU
tensors other than single numbers.  Run as a script, it calibrates a model here and there, and prints the differences.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from mbq_export.calibrate import calibrate
from mbq_export.calibrated import Calibrated
from mbq_export.context import Calibration
from mbq_export.format.codes import decode
from mbq_export.methods import METHODS, Recipe
from mbq_export.model import blocks
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.routing import mlp
from mbq_runtime.bundle.slice_profile import SliceProfile

aten = torch.ops.aten

_CROSSING = {aten.copy_.default, aten._to_copy.default}
_INDEXED_FROM_ANYWHERE = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class OtherTensor(torch.Tensor):
    """A tensor on the other device, with its numbers in ``inner``."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OtherTensor:
        outer = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("other", 0),
        )  # fmt: skip
        outer.inner = inner
        return outer  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one op on the inner tensors and wrap its result."""
    if func is aten._fused_sdp_choice.default:
        return 0  # attention by its formula
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    others = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OtherTensor)}
    if others and func not in _CROSSING:
        for tensor in tensors[:1] if func in _INDEXED_FROM_ANYWHERE else tensors:
            if not isinstance(tensor, OtherTensor) and tensor.ndim > 0:
                raise RuntimeError(f"{func}: a tensor {tuple(tensor.shape)} is on the processor, another is not")
    there = bool(others)
    if func is aten.copy_.default:
        there = isinstance(args[0], OtherTensor)
    elif kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "other"
        if there:
            kwargs = {**kwargs, "device": torch.device("cpu")}
    inside = pytree.tree_map_only(OtherTensor, lambda tensor: tensor.inner, (args, kwargs))
    result = func(*inside[0], **inside[1])
    if not there:
        return result
    return pytree.tree_map_only(
        torch.Tensor, lambda tensor: others[id(tensor)] if id(tensor) in others else OtherTensor(tensor), result
    )


class _Everywhere(TorchDispatchMode):
    """Catches ops that create tensors on the device, which have none of its tensors as arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("other", _Backend())  # type: ignore[no-untyped-call]


@contextmanager
def other_device() -> Iterator[str]:
    """While the block runs, torch knows this device."""
    with _Everywhere():
        yield "other:0"


def _calibrated(model: str, method: str, device: str) -> Calibrated:
    checkpoint = load(locate(model), None, device)
    assert checkpoint.device.type == torch.device(device).type
    rng = np.random.default_rng(0)
    fitted, held_back = (rng.integers(0, checkpoint.decoder.vocab_size, (4, 32)) for _ in range(2))
    # ``learned`` tunes a base slice of two bits twice.
    profile = SliceProfile((2, 2, 2, 2) if method == "learned" else (3, 1, 2, 2))
    recipe = Recipe(profile, 32, method, {"rtn": 0, "learned": 4}[method], "auto", 0)
    return calibrate(Calibration(checkpoint, recipe), fitted, held_back)


def main(model: str, method: str) -> None:
    """Print relative differences of the weights at full depth, and both quality curves."""
    blocks.fast_bytes = lambda: 4  # both in float32
    # Every op on that device runs in Python.
    METHODS[method] = replace(METHODS[method], sweeps=1)
    mlp._STEPS = 15
    with sdpa_kernel(SDPBackend.MATH):
        here = _calibrated(model, method, "cpu")
    with other_device() as device:
        there = _calibrated(model, method, device)
    apart = {}
    for name, unit in here.units.items():
        one, other = (
            decode(sliced, here.profile, here.profile.depths) for sliced in (unit.sliced, there.units[name].sliced)
        )
        apart[name] = float(np.linalg.norm(one - other) / np.linalg.norm(one))
    curves = [[point.perplexity for point in calibrated.curve] for calibrated in (here, there)]
    print(json.dumps({"apart": apart, "here": curves[0], "there": curves[1]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
