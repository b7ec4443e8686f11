"""What a token costs on a GPU, counted from the launch plans of bundles, and an ESTIMATE of the time it takes there.

    python tests/benchmarks/gpu_estimate.py BUNDLE...

For each bundle: launches, work-groups, and the bytes of weights a decoded token reads at each depth.  The estimate is
the larger of two times, bytes over the memory bandwidth and operations over the float32 rate of the chip named in the
table of targets, with nothing for launches: a bound that no real device reaches.  Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from mbq_runtime.bundle import gpu_plan
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_targets.machines import TARGETS

# Operations on a weight of one token, a multiply-add as two: shift, mask, shift and or for each plane, shared by the
# four weights of a word's byte lanes; then extract (2), convert (1), scale and offset (2), multiply-add (2).
_PER_PLANE, _PER_WEIGHT = 4 / 4, 7


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches, bytes and an estimate for bundles of GPU targets")
    parser.add_argument("bundles", nargs="+", type=Path)
    for bundle in parser.parse_args().bundles:
        _show(bundle)


def _show(bundle: Path) -> None:
    manifest, plan = bundle_manifest.read(bundle), gpu_plan.read_plan(bundle)
    name = manifest.target.name
    gpu = TARGETS[name].gpu
    assert gpu is not None
    launches = plan.decode_launches
    kinds = Counter(launch.kernel.split("_")[0] for launch in launches)
    matmuls = [launch for launch in launches if launch.kernel.startswith("matmul")]
    groups = [launch.grid[0] * launch.grid[1] for launch in matmuls]
    print(f"\n{manifest.model.name} on {name} ({gpu.dialect}; {gpu.chip or 'no one chip'})")
    print(f"  {len(launches)} launches a token: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    print(
        f"  matmul: work-groups of {gpu.work_groups.matmul_threads} items "
        f"({16 // gpu.work_groups.rows} x {gpu.work_groups.rows} rows, {gpu.work_groups.splits} parts of K), "
        f"{min(groups)} to {max(groups)} of them; prompt: {plan.chunk} tokens a pass in tiles of {gpu.work_groups.tile}"
    )
    full = plan.bytes_per_token(manifest.profile.depths)
    for depth, bits in enumerate(manifest.profile.depth_bits, 1):
        size = plan.bytes_per_token(depth)
        line = f"  {bits} bits: {size / 1e6:7.2f} MB of weights read ({size / full:.2f} of all)"
        if gpu.bandwidth_gb_s:
            planes = manifest.profile.depth_planes[depth - 1]
            operations = manifest.weights.routed_parameters * (_PER_WEIGHT + _PER_PLANE * planes)
            memory_ms, compute_ms = size / gpu.bandwidth_gb_s / 1e6, operations / gpu.rate_gflop_s / 1e6
            line += (
                f"; ESTIMATE {max(memory_ms, compute_ms):.2f} ms or more"
                f" (memory {memory_ms:.2f} at {gpu.bandwidth_gb_s:g} GB/s,"
                f" arithmetic {compute_ms:.2f} at {gpu.rate_gflop_s:g} Gflop/s)"
            )
        print(line)


if __name__ == "__main__":
    main()
