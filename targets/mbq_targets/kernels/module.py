"""All kernels of one library: an IRModule for an ISA and a model's needs."""

from __future__ import annotations

from typing import Any

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..spec import KernelSpec
from .activations import quantize
from .emit import module
from .gate import ACTIVATIONS, gate
from .gather import gather
from .isa import Isa
from .layout import DepthPlan, plan_depth
from .matmul import gemm, gemv
from .router import router_sums

PREFIX = "mbq_"


def depth_plans(profile: SliceProfile, max_width: int) -> list[DepthPlan]:
    """The plan of every depth, depth 1 first."""
    return [plan_depth(profile.plane_bits, planes, max_width) for planes in profile.depth_planes]


def build_module(isa: Isa, spec: KernelSpec) -> Any:
    """IRModule with mbq_quantize, mbq_router_sums, mbq_gate_<activation> and, for every depth d,
    mbq_{gemv,gemm,gather}_d<d>."""
    group, width = spec.group_size, spec.activation_bytes
    with module() as builder:
        quantize(group, width, f"{PREFIX}quantize")
        router_sums(f"{PREFIX}router_sums")
        for activation in ACTIVATIONS:
            gate(activation, f"{PREFIX}gate_{activation}")
        for depth, plan in enumerate(depth_plans(spec.profile, isa.max_width), 1):
            gemv(isa, plan, group, width, f"{PREFIX}gemv_d{depth}")
            gemm(isa, plan, group, width, f"{PREFIX}gemm_d{depth}")
            gather(plan, group, f"{PREFIX}gather_d{depth}")
    return builder.get()
