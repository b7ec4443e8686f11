"""A bundle's routers beside the other kinds and a random choice, at equal bits, on text that none was fitted to.

    python tests/benchmarks/router_ablation.py BUNDLE [--model smollm2-135m] [--data wikipedia] [--windows 24]
        [--bits 2.5,3,3.5,4,5] [--json FILE]

Slices, norms and routers are the bundle's, which an ONNX graph of a rotated model must hold; the other kinds are fitted
to the text that it was calibrated on.  Ratios are over the shipped kind's perplexity, +- the standard error of the
paired difference over windows; bits are interpolated to the very budget, and routers' own count among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from onnx import numpy_helper

from mbq_export.context import Calibration
from mbq_export.data import windows as text_windows
from mbq_export.data.texts import PACKAGED, SAID
from mbq_export.format.codes import Sliced
from mbq_export.format.planes import unpack_scales, unpack_slices
from mbq_export.format.router import RouterParams
from mbq_export.methods import CONTEXT_TOKENS, METHODS, Recipe
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.sliced_linear import values_at
from mbq_export.model.source import locate
from mbq_export.progress import Progress, no_report
from mbq_export.routing import kinds, select
from mbq_export.routing.slice_gains import measure_gains
from mbq_export.transforms.rotation import rotate
from mbq_export.tuning.teacher import Teacher
from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.bundle.manifest import read as read_manifest
from mbq_runtime.commands.common import listed
from mbq_runtime.perplexity import cut_windows, read_text
from mbq_runtime.tables import markdown

Tensors = dict[str, Any]


def stored_slices(manifest: Manifest, tensors: Tensors) -> dict[str, Sliced]:
    return {
        layer.name: Sliced(
            unpack_slices(
                [tensors[f"{layer.name}.planes_{e}"] for e in range(1, manifest.profile.depths + 1)],
                layer.N,
                layer.K,
                manifest.profile,
            ),
            *unpack_scales(tensors[f"{layer.name}.scales"], layer.N, manifest.profile.depths),
        )
        for layer in manifest.weights.linears
    }


def stored_routers(manifest: Manifest, tensors: Tensors) -> dict[str, RouterParams]:
    budgets, thresholds = tensors["budget_table"]
    found = {}
    for layer in manifest.weights.linears:
        name = f"{layer.name}.router"
        learned = [tensors.get(f"{name}.{part}") for part in ("w1", "b1", "w2")]
        found[layer.name] = RouterParams(
            tensors[f"{name}.bias"], tensors[f"{name}.norm_gain"], budgets, thresholds, *learned
        )
    return found


def restore(checkpoint: Checkpoint, manifest: Manifest, tensors: Tensors) -> dict[str, Sliced]:
    """Make all but the linear layers what the bundle's are; returns its slices."""
    d = checkpoint.decoder
    if not d.turns or not d.tied or not METHODS[manifest.calibration["method"]].feedback:
        raise click.UsageError(
            f"{d.family.model_type} by {manifest.calibration['method']}: needed a rotated, tied model"
        )
    rotate(checkpoint, manifest.seed)
    names = {
        f"layers.{i}.{part}_norm.weight": d.input_norm(i, f"{part}_in")
        for i in range(d.layers)
        for part in ("attn", "mlp")
    }
    names["final_norm.weight"] = d.final_norm
    slices = stored_slices(manifest, tensors)
    with torch.no_grad():
        for stored, module in names.items():
            checkpoint.model.get_submodule(module).weight.copy_(torch.from_numpy(tensors[stored].copy()))
        head = values_at(slices[d.head.name], manifest.profile, manifest.profile.depths)
        checkpoint.model.get_input_embeddings().weight.copy_(head)
    return slices


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", default="smollm2-135m")
@click.option("--data", default="wikipedia", help="A file, or one of: " + ", ".join([*PACKAGED, *SAID]))
@click.option("--windows", default=24)
@click.option("--bits", default="2.5,3,3.5,4,5")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(bundle: Path, model: str, data: str, windows: int, bits: str, json_file: Path | None) -> None:
    manifest = read_manifest(bundle)
    profile, facts = manifest.profile, manifest.calibration
    budgets = [b for b in listed("--bits", bits, float) if profile.min_bits < b < profile.depth_bits[-1]]
    initializers = onnx.load(str(bundle / "model.onnx")).graph.initializer
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in initializers}
    checkpoint = load(locate(model))
    fitted, held_back = (facts[name] // CONTEXT_TOKENS for name in ("tokens", "held_back_tokens"))
    source = text_windows.open_source(None)
    if source.name != facts["text"]:
        raise click.UsageError(f"{bundle} was calibrated on {facts['text']}: needed {source.name}")
    _, held = text_windows.calibration_windows(checkpoint, source, fitted, held_back, CONTEXT_TOKENS)
    if data in SAID:
        text = SAID[data](checkpoint, no_report)
    else:
        text = PACKAGED[data]() if data in PACKAGED else read_text(Path(data))
    tokens = checkpoint.tokens(text)
    measured = np.array(cut_windows(tokens, CONTEXT_TOKENS, checkpoint.opening_tokens, windows))
    with Progress(quiet=False) as progress:
        recipe = Recipe(profile, manifest.group_size, facts["method"], seed=manifest.seed)
        calibration = Calibration(checkpoint, recipe, report=progress)
        original = Teacher(calibration, measured, exact=True)
        slices = restore(checkpoint, manifest, tensors)
        stats = measure_gains(calibration, slices, np.array_split(held, 2)[0], keep_inputs=True)
        fits = {kind: select.fit_routers(calibration, kind, stats) for kind in kinds.ROUTERS}
        fits[manifest.router.kind] = stored_routers(manifest, tensors)
        losses, used = select.measure_kinds(calibration, fits, slices, original, budgets)
    found = select.comparison(losses, manifest.router.kind, budgets)
    print(f"{bundle.name}, {data}, {len(measured)} windows of {CONTEXT_TOKENS} tokens; KL divergence, nats a token")
    rows: list[list[str]] = []
    for kind, by_bits in found.items():
        cells = [
            f"{of['kl_divergence']:.4f}"
            + (
                " (shipped)"
                if kind == manifest.router.kind
                else f" ({of['over_shipped'] - 1:+.1%} +- {of['stderr']:.1%})"
            )
            for of in by_bits.values()
        ]
        rows.append([kind, *cells])
    print(markdown(["router", *(f"{b:g} bits" for b in budgets)], rows, words=["router"]))
    if json_file is not None:
        json_file.write_text(json.dumps({"bits_used": used, "routers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
