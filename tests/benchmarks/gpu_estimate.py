"""What a token costs on each GPU target, counted from the launch plans, and an ESTIMATE of the time it takes there.

    python tests/benchmarks/gpu_estimate.py [--model MODEL]

Exports by rounding to nearest (the sizes are those of any method), then prints for every GPU target the launches,
work-groups and bytes of a decoded token at each depth.  The estimate is the larger of two times, bytes over the
memory bandwidth and operations over the float32 rate of the chip named, both from its maker's figures, plus nothing
for launches: a bound no real device reaches.  Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from mbq_export.cli import command
from mbq_runtime import manifest as bundle_manifest
from mbq_runtime.engine import gpu_plan
from mbq_targets.table import TARGETS

# Operations an item spends on a weight of one token, a multiply-add as two: shift, mask and or of each plane are
# shared by four weights; then extract (2), convert, scale (2), multiply-add (2).
_EXTRACT, _PER_PLANE = 7, 4 / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    model = parser.parse_args().model
    targets = [target for target in TARGETS.values() if target.gpu]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "--model",
            model,
            "--method",
            "rtn",
            "--router",
            "norm",
            "--calib-tokens",
            "1024",
            "--output",
            folder,
        ]
        arguments += [part for target in targets for part in ("--target", target.name)]
        command([*arguments, "--json"], standalone_mode=False)
        stem = Path(model).name.removesuffix(".gguf")
        for target in targets:
            _show(Path(folder) / f"{stem}-{target.name}", target.name)


def _show(bundle: Path, name: str) -> None:
    gpu = TARGETS[name].gpu
    assert gpu is not None
    manifest, plan = bundle_manifest.read(bundle), gpu_plan.read(bundle)
    launches = plan.decode_launches
    kinds = Counter(launch.kernel.split("_")[0] for launch in launches)
    matmuls = [launch for launch in launches if launch.kernel.startswith("matmul")]
    groups = [launch.grid[0] * launch.grid[1] for launch in matmuls]
    print(f"\n{name} ({gpu.dialect}; {gpu.chip or 'no one chip'})")
    print(f"  {len(launches)} launches a token: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    print(
        f"  matmul: work-groups of {gpu.tuning.matmul_threads} items "
        f"({16 // gpu.tuning.rows} x {gpu.tuning.rows} rows, {gpu.tuning.splits} parts of K), "
        f"{min(groups)} to {max(groups)} of them; prompt: {plan.chunk} tokens a pass in tiles of {gpu.tuning.tile}"
    )
    full = plan.bytes_per_token(manifest.profile.depths)
    for depth, bits in enumerate(manifest.profile.depth_bits, 1):
        size = plan.bytes_per_token(depth)
        line = f"  {bits} bits: {size / 1e6:7.2f} MB of weights read ({size / full:.2f} of all)"
        if gpu.bandwidth_gb_s:
            planes = manifest.profile.depth_planes[depth - 1]
            operations = manifest.weights.routed_parameters * (_EXTRACT + _PER_PLANE * planes)
            memory_ms, compute_ms = size / gpu.bandwidth_gb_s / 1e6, operations / gpu.rate_gflop_s / 1e6
            line += (
                f"; ESTIMATE {max(memory_ms, compute_ms):.2f} ms or more"
                f" (memory {memory_ms:.2f} at {gpu.bandwidth_gb_s:g} GB/s,"
                f" arithmetic {compute_ms:.2f} at {gpu.rate_gflop_s:g} Gflop/s)"
            )
        print(line)


if __name__ == "__main__":
    main()
