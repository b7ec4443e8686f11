"""All kernels of one library, as IRModules."""

from __future__ import annotations

from typing import Any

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..spec import KernelSpec
from .activations import quantize
from .attention import attend, merge
from .emit import module
from .few import few
from .gate import ACTIVATIONS, gate
from .gather import gather
from .isa import Isa
from .layout import DepthPlan, plan_depth
from .matmul import gemm, gemv
from .router import router_sums
from .spread import round_queries, spread

PREFIX = "mbq_"
"""The symbol of each kernel starts with it."""


def depth_plans(profile: SliceProfile, max_width: int) -> list[DepthPlan]:
    """The plan of every depth, depth 1 first.

    Args:
        profile: bits of each slice.
        max_width: fields that an instruction set joins at most, see ``plan_depth``.
    """
    return [plan_depth(profile, depth, max_width) for depth in range(1, profile.depths + 1)]


def linear_module(isa: Isa, spec: KernelSpec) -> Any:
    """IRModule with quantize, router_sums, gate_ACTIVATION and, for each depth D, gemv_dD, few_dD, gemm_dD, gather_dD.

    few_dD is left out where gemm_dD takes all passes of several tokens.

    Args:
        isa: instruction set.
        spec: slices, group size and activation bits of the model.
    """
    group, width = spec.group_size, spec.activation_bytes
    with module() as builder:
        quantize(isa, group, width, f"{PREFIX}quantize")
        router_sums(f"{PREFIX}router_sums")
        for activation in ACTIVATIONS:
            gate(activation, f"{PREFIX}gate_{activation}")
        for depth, plan in enumerate(depth_plans(spec.profile, isa.max_width), 1):
            gemv(isa, plan, group, width, f"{PREFIX}gemv_d{depth}")
            if isa.few_at_most(width):
                few(isa, plan, group, width, f"{PREFIX}few_d{depth}")
            gemm(isa, plan, group, width, f"{PREFIX}gemm_d{depth}")
            gather(plan, group, f"{PREFIX}gather_d{depth}")
    return builder.get()


def cache_module(isa: Isa) -> Any:
    """IRModule with the kernels of keys and values of 8 bits: spread, round_queries, attend, merge.

    Args:
        isa: instruction set.
    """
    with module() as builder:
        spread(f"{PREFIX}spread")
        round_queries(isa, f"{PREFIX}round_queries")
        attend(isa, f"{PREFIX}attend")
        merge(isa, f"{PREFIX}merge")
    return builder.get()


def build_modules(isa: Isa, spec: KernelSpec) -> list[Any]:
    """IRModules of all kernels of a library.

    Args:
        isa: instruction set.
        spec: what the kernels are compiled for.
    """
    return [linear_module(isa, spec), *([cache_module(isa)] if spec.kv_bits == 8 else [])]
