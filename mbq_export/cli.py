"""The command ``mbq-export``: options, plan, progress, closing table.  Only commands print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mbq_runtime import plotting
from mbq_runtime.errors import MbqError, UsageError

from .compare.command import command as compare
from .methods import AUTO_SLICES, METHODS
from .progress import Progress

if TYPE_CHECKING:
    from mbq_runtime.bundle.manifest import Manifest
    from mbq_targets.machines import Target

    from .export import Prepared

SHOWN_BITS = ("2", "3", "4", "6", "8")


def _list_targets(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from mbq_targets.machines import TARGETS

    for target in TARGETS.values():
        needs = " ".join(target.features) or (target.gpu.engine if target.gpu else "-")
        click.echo(f"{target.name:15} {target.arch:8} {needs:34} {target.description}")
    context.exit()


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.option("--target", "targets", multiple=True, default=["arm64"], help="Machine to export for; may be repeated.")
@click.option(
    "--model",
    "-m",
    default="smollm2-135m",
    help="Hugging Face folder or id, a GGUF file, or the packaged smollm2-135m.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder to write; with several targets, one in it for each.  [default: bundles/MODEL-TARGET]",
)
@click.option("--engine", default="onnx", help="What a processor's bundle runs on: onnx, tvm or both.")
@click.option(
    "--slices",
    default="3,1,2,2",
    help="Slice widths in bits, most significant first; they add up to 8.  auto calibrates with "
    + " and with ".join(AUTO_SLICES)
    + ", and writes what measures better.",
)
@click.option("--group-size", default="auto", type=click.Choice(["auto", "32", "64", "128"]), help="Weights per scale.")
@click.option(
    "--activations",
    "activation_bits",
    default="16",
    type=click.Choice(["8", "16"]),
    callback=lambda context, parameter, value: int(value),
    help="Bits of the integers that processors round activations to: 8 reads prompts faster, "
    "16 gives the same reply on every machine.",
)
@click.option(
    "--method",
    default="nested",
    type=click.Choice(list(METHODS)),
    help="How to slice; " + "; ".join(f"{name}: {method.help}" for name, method in METHODS.items()) + ".",
)
@click.option(
    "--tune-steps",
    type=click.IntRange(min=0),
    help="Steps of end-to-end tuning: fewer are quicker, more are better.  [default: the method's]",
)
@click.option(
    "--router",
    default="auto",
    type=click.Choice(["auto", "static", "norm", "mlp"]),
    help="Rule that picks each token's depth; auto takes what measures best.",
)
@click.option("--floor-ratio", default=1.25, help="Perplexity over the original's that is acceptable at the floor.")
@click.option(
    "--calib-data",
    metavar="DATA",
    help="A UTF-8 text, a .jsonl of chats, or hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]].  [default: Wikipedia, packaged]",
)
@click.option(
    "--calib-tokens",
    type=int,
    help="How many of its tokens to use.  Default: "
    + ", ".join(f"{method.calib_tokens} for {name}" for name, method in METHODS.items())
    + ".",
)
@click.option(
    "--device",
    default="auto",
    help="Where to calibrate, as torch names it: cpu, cuda, cuda:1.  auto is a GPU with enough free memory, else the "
    "processor.",
)
@click.option("--seed", default=0, help="Seed of everything random; the same seed gives the same bundle.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the quality curve into this file: png, svg or pdf.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option(
    "--list-targets", is_flag=True, is_eager=True, expose_value=False, callback=_list_targets, help="List targets."
)
@click.version_option(package_name="mbq-export")
@click.pass_context
def command(context: click.Context, /, plot: Path | None, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Turn a decoder LLM into a bundle whose precision can follow the device.

    Without options: SmolLM2-135M for a 64-bit ARM board with dot-product instructions.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    from mbq_runtime.bundle.slice_profile import SliceProfile
    from mbq_targets.machines import resolve

    from .write.plot import quality_curve

    if plot is not None:
        plotting.check(plot)
    # One line per rejected option, before torch is imported.
    targets = {name: resolve(name) for name in options.pop("targets")}
    slices = options.pop("slices")
    options["profiles"] = tuple(SliceProfile.parse(text) for text in (AUTO_SLICES if slices == "auto" else [slices]))
    options["outputs"] = _output_folders(options.pop("output"), options["model"], targets)
    from . import processes
    from .export import ENGINE_CHOICES, Options, prepare, run

    engine = options.pop("engine")
    if engine not in ENGINE_CHOICES:
        raise UsageError(f"--engine {engine!r} is not known; choose one of: {', '.join(ENGINE_CHOICES)}")
    options["engines"] = ENGINE_CHOICES[engine]
    with processes.connected():
        prepared = prepare(Options(**options))
        first = processes.index() == 0
        if first and not as_json:
            _show_plan(prepared)
        if dry_run:
            if first and as_json:
                click.echo(json.dumps(_plan_document(prepared)))
            return
        with Progress(quiet=as_json or not first) as progress:
            manifests = run(prepared, progress)
    if not first:
        return
    if plot is not None:
        # One calibration, one curve, however many targets.
        quality_curve(plot, prepared.source.name, next(iter(manifests.values())).quality)
    if as_json:
        results = [_result_document(prepared, output, manifest) for output, manifest in manifests.items()]
        click.echo(json.dumps(results[0] if len(results) == 1 else results))
        return
    for output, manifest in manifests.items():
        _show_result(output, manifest)


command.add_command(compare)


def _refuse_options(context: click.Context) -> None:
    """Options of an export before a subcommand would be dropped without a word."""
    for parameter in context.command.params:
        if parameter.name and context.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"{parameter.opts[0]}: options of {context.invoked_subcommand} come after its name")


def _output_folders(output: Path | None, model: str, targets: dict[str, Target]) -> dict[Path, Target]:
    stem = model.rstrip("/").split("/")[-1].removesuffix(".gguf")
    if output is not None and len(targets) == 1:
        return dict(zip([output], targets.values(), strict=True))
    folder = output or Path("bundles")
    return {folder / f"{stem}-{name}": target for name, target in targets.items()}


def _plan_document(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    return {
        "model": prepared.source.name,
        "architecture": plan.decoder.family.architecture,
        "layers": plan.decoder.layers,
        "routed_parameters": plan.routed_parameters,
        "slices": list(plan.profile.slices),
        "profiles": [str(profile) for profile in prepared.options.profiles],
        "group_size": plan.group_size,
        "activation_bits": prepared.options.activation_bits,
        "engines": list(prepared.options.engines),
        "router": prepared.options.router,
        "calib_tokens": plan.calib_tokens,
        "device": prepared.device,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "work_bytes": plan.work_bytes,
        "outputs": [
            {"output": str(output), "target": target.name, "disk_bytes": prepared.plans[output].disk_bytes}
            for output, target in prepared.options.outputs.items()
        ],
    }


def _show_plan(prepared: Prepared) -> None:
    from . import processes

    plan = prepared.plan
    d = plan.decoder
    shape = f"{d.layers} layers, {d.context_length} tokens of context"
    click.echo(f"Model    {prepared.source.name}: {d.family.architecture}, {shape}")
    for role, (n, k) in {**d.role_shapes, "head": (d.vocab_size, d.hidden_size)}.items():
        click.echo(f"           {role:9} {n:6} x {k:<6} x {1 if role == 'head' else d.layers}")
    profiles = " or ".join(map(str, prepared.options.profiles))
    click.echo(f"Slices   {profiles} in groups of {plan.group_size}, router {prepared.options.router}")
    work = f"{plan.work_bytes >> 20} MB of disk while it calibrates"
    where = "" if prepared.device == "cpu" else f" of {prepared.device}"
    each = f" in each of {processes.count()} processes" if processes.count() > 1 else ""
    click.echo(f"Needs    about {plan.peak_memory_bytes >> 20} MB of memory{where}{each}, and {work}")
    for output, target in prepared.options.outputs.items():
        size_mb = prepared.plans[output].disk_bytes >> 20
        click.echo(f"Output   {output}, about {size_mb} MB, for {target.name}: {target.description}")
    engines = (e for target in prepared.options.outputs.values() for e in target.engines(prepared.options.engines))
    click.echo(f"Engines  {', '.join(dict.fromkeys(engines))}")


def _result_document(prepared: Prepared, output: Path, manifest: Manifest) -> dict[str, Any]:
    document = _plan_document(prepared)
    del document["outputs"]
    return {
        **document,
        "slices": list(manifest.slices),
        "output": str(output),
        "target": manifest.target.name,
        "calibration": dict(manifest.calibration),
        "bundle_bytes": manifest.total_bytes,
        "files": {entry.name: entry.size for entry in manifest.files},
        "bytes_per_token": dict(manifest.weights.bytes_per_token),
        "next": _next_command(output),
    }


def _next_command(output: Path) -> str:
    return f'mbq run {output} "Tell me about the sea."'


def _show_result(output: Path, manifest: Manifest) -> None:
    click.echo(f"\nWrote {output}")
    for entry in manifest.files:
        click.echo(f"  {entry.name:24} {entry.size / 1e6:9.2f} MB")
    click.echo(f"  {'in all':24} {manifest.total_bytes / 1e6:9.2f} MB\nWeights read per token")
    for bits in SHOWN_BITS:
        if bits in manifest.weights.bytes_per_token:
            click.echo(f"  {bits} bits on average        {manifest.weights.bytes_per_token[bits] / 1e6:9.2f} MB")
    for slices, figures in manifest.calibration.get("slices", {}).items():
        floor, perplexity = figures["floor_bits"], figures["perplexity"]
        click.echo(f"Slices {slices}: floor {floor:g} bits, perplexity {perplexity:.2f} on average over 4 to 8 bits")
    click.echo(f"Slices {','.join(map(str, manifest.slices))} are written")
    quality = manifest.quality
    click.echo(f"Perplexity on held-back text (the original model: {quality.reference_perplexity:.2f})")
    for point in quality.curve:
        ratio = point.perplexity / quality.reference_perplexity
        click.echo(f"  {point.avg_bits_used:4.2f} bits on average     {point.perplexity:9.2f}  x {ratio:.3f}")
    click.echo(f"  The quality floor is {quality.floor_bits:g} bits; router {manifest.router.kind}")
    click.echo(f"Copy the folder to the device and run there:\n  {_next_command(output)}")


def main() -> None:
    """Entry point: prints an error as one line and exits with its code; 130 when interrupted."""
    try:
        command(standalone_mode=False)
    except MbqError as error:
        click.echo(f"mbq-export: error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        click.echo(f"mbq-export: error: {error.format_message()}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("mbq-export: interrupted; the same command goes on from here", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
