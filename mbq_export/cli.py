"""The command ``mbq-export``: options, plan, progress, closing table.  Only commands print."""

from __future__ import annotations

import inspect
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mbq_runtime import plotting, tables
from mbq_runtime.errors import MbqError, UsageError
from mbq_runtime.streams import replace_closed

from .compare.command import command as compare
from .export import export
from .lines import one_line
from .methods import AUTO_SLICES, METHODS
from .options import ENGINE_CHOICES, GROUP_SIZE_CHOICES, KV_CHOICES, ROUTER_CHOICES, Options
from .progress import Progress, StageTimes

if TYPE_CHECKING:
    from mbq_runtime.bundle.manifest import Manifest

    from .prepare import Prepared

log = logging.getLogger("mbq_export.cli")

SHOWN_BITS = ("2", "3", "4", "6", "8")
"""Average bits that the closing table states bytes per token for."""

DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(export).parameters.items()}
"""The command has the defaults of the Python API."""

_LOG_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_LOG_FORMAT = "%(asctime)s %(name)s: %(message)s"


def _list_targets(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from mbq_targets.machines import TARGETS

    headings = ("name", "arch", "machine", "needs")
    rows = [
        (t.name, t.arch, t.description, " ".join(t.features) or (t.gpu.engine if t.gpu else "nothing"))
        for t in TARGETS.values()
    ]
    click.echo(tables.aligned(headings, rows, words=headings))
    context.exit()


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.option(
    "--target", "targets", multiple=True, default=DEFAULTS["targets"], help="Machine to export for; may be repeated."
)
@click.option(
    "--model",
    "-m",
    default=DEFAULTS["model"],
    help="Hugging Face folder or id, a GGUF file, or the packaged smollm2-135m.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder to write; with several targets, one in it for each.  [default: bundles/MODEL-TARGET]",
)
@click.option(
    "--engine",
    default=DEFAULTS["engine"],
    help=f"What a processor's bundle runs on: {', '.join(ENGINE_CHOICES)}.",
)
@click.option(
    "--slices",
    default=DEFAULTS["slices"],
    help="Slice widths in bits, most significant first; their sum is 8.  auto calibrates with "
    + " and with ".join(AUTO_SLICES)
    + ", and writes what measures better.",
)
@click.option(
    "--group-size", default=DEFAULTS["group_size"], type=click.Choice(GROUP_SIZE_CHOICES), help="Weights per scale."
)
@click.option(
    "--activations",
    "activation_bits",
    default=str(DEFAULTS["activation_bits"]),
    type=click.Choice(["8", "16"]),
    callback=lambda context, parameter, value: int(value),
    help="Bits of the integers that processors round activations to: 8 reads prompts faster, "
    "16 gives the same reply on every machine.",
)
@click.option(
    "--kv",
    "kv_bits",
    default=str(DEFAULTS["kv_bits"]),
    type=click.Choice([str(choice) for choice in KV_CHOICES]),
    callback=lambda context, parameter, value: value if value == "auto" else int(value),
    help="Bits of a cached key or value: 8 reads long contexts faster and takes a quarter of their memory; 32 gives "
    "nearly the same logits on every machine; auto is 8 where there are kernels for them, else 32.",
)
@click.option(
    "--method",
    default=DEFAULTS["method"],
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
    default=DEFAULTS["router"],
    type=click.Choice(ROUTER_CHOICES),
    help="Rule that picks each token's depth; auto takes what measures best.",
)
@click.option(
    "--floor-ratio",
    default=DEFAULTS["floor_ratio"],
    help="Highest acceptable perplexity at the quality floor, over the original's.",
)
@click.option(
    "--calib-data",
    metavar="DATA",
    help="A UTF-8 text, a .jsonl of chats, or hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]].  "
    "[default: Wikipedia, code, and replies of the model]",
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
    default=DEFAULTS["device"],
    help="Where to calibrate, as torch names it: cpu, cuda, cuda:1.  auto is a GPU with enough free memory, else the "
    "processor.",
)
@click.option(
    "--seed", default=DEFAULTS["seed"], help="Seed of all random numbers; the same seed gives the same bundle."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the quality curve into this file: png, svg or pdf.")
@click.option("--profile", is_flag=True, help="Print how long each stage took.")
@click.option(
    "--sign", type=click.Path(path_type=Path), metavar="KEY", help="File of the private Ed25519 key to sign with."
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option(
    "--list-targets", is_flag=True, is_eager=True, expose_value=False, callback=_list_targets, help="List targets."
)
@click.option("-v", "--verbose", count=True, help="Show the log on stderr; twice: with details.")
@click.version_option(package_name="mbq-export")
@click.pass_context
def command(
    context: click.Context,
    /,
    plot: Path | None,
    profile: bool,
    as_json: bool,
    dry_run: bool,
    verbose: int,
    targets: tuple[str, ...],
    **options: Any,
) -> None:
    """Turn a decoder LLM into a bundle whose precision can follow the device.

    Without options: SmolLM2-135M for a 64-bit ARM board with dot-product instructions.
    """
    _show_log(verbose)
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    if plot is not None:
        plotting.check(plot)
    # Unknown options are refused before torch is imported.
    asked = Options.of(options.pop("model"), targets, **options)
    from . import processes
    from .export import run
    from .prepare import prepare

    with processes.connected():
        prepared = prepare(asked, dry_run=dry_run)
        first = processes.index() == 0
        if first and not as_json:
            _show_plan(prepared)
        if dry_run:
            if first and as_json:
                click.echo(json.dumps(_plan_document(prepared)))
            return
        with Progress(quiet=as_json or not first) as progress, StageTimes() as times:

            def report(what: str, done: int, total: int) -> None:
                progress(what, done, total)
                times(what, done, total)

            manifests = run(prepared, report)
    if first:
        _show_results(prepared, manifests, plot, as_json)
        if profile:
            _show_times(times)


command.add_command(compare)


def _show_times(times: StageTimes) -> None:
    """On stderr, so that ``--json`` stays one object."""
    rows = [
        (stage, f"{elapsed_s:.1f} s", f"{times.processor_s[stage]:.1f} s")
        for stage, elapsed_s in times.elapsed_s.items()
    ]
    all_s = [f"{sum(seconds.values()):.1f} s" for seconds in (times.elapsed_s, times.processor_s)]
    headings = ("stage", "elapsed", "processor time")
    click.echo("\n" + tables.aligned(headings, [*rows, ("all", *all_s)], words=headings[:1]), err=True)


def _show_log(verbose: int) -> None:
    # transformers' own remarks go to stderr with the log alone.
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")
    else:
        logging.basicConfig(format=_LOG_FORMAT)
        for package in ("mbq_export", "mbq_targets", "mbq_runtime"):
            logging.getLogger(package).setLevel(_LOG_LEVELS[min(verbose, len(_LOG_LEVELS) - 1)])


def _refuse_options(context: click.Context) -> None:
    """Refuse options of an export before a subcommand, which click would ignore."""
    for parameter in context.command.params:
        if parameter.name in (None, "verbose"):
            continue
        if context.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"{parameter.opts[0]}: options of {context.invoked_subcommand} come after its name")


def _plan_document(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    return {
        "model": prepared.source.name,
        "architecture": plan.decoder.family.architecture,
        "layers": plan.decoder.layers,
        "parameters": plan.parameters,
        "routed_parameters": plan.routed_parameters,
        "read_parameters": plan.read_parameters,
        "bytes_per_token": {f"{bits:g}": plan.bytes_per_token(bits) for bits in plan.profile.depth_bits},
        "context_bytes": {
            "each_token": plan.decoder.token_bytes(plan.kv_bits),
            "states": plan.decoder.state_bytes,
        },
        "slices": list(plan.profile.slices),
        "profiles": [str(profile) for profile in prepared.options.profiles],
        "group_size": plan.group_size,
        "activation_bits": prepared.options.activation_bits,
        "kv_bits": plan.kv_bits,
        "engines": list(prepared.options.engines),
        "router": prepared.options.router,
        "calib_tokens": plan.calib_tokens,
        "device": prepared.device,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "work_bytes": plan.work_bytes,
        "outputs": [
            {
                "output": str(output),
                "target": target.name,
                "disk_bytes": prepared.plans[output].disk_bytes,
                "exists": output.exists(),
            }
            for output, target in prepared.options.outputs.items()
        ],
    }


def _show_plan(prepared: Prepared) -> None:
    click.echo(tables.pairs(_plan_lines(prepared)))


def _plan_lines(prepared: Prepared) -> Iterator[tuple[str, str]]:
    from . import processes

    plan, outputs = prepared.plan, prepared.options.outputs
    d = plan.decoder
    shape = f"{d.layers} layers, {d.context_length} tokens of context"
    yield "Model", f"{prepared.source.name}: {d.family.architecture}, {shape}"
    if prepared.left_out:
        yield "", f"its text part alone; left out: {', '.join(prepared.left_out)}"
    for (role, (n, k)), count in {**d.shape_counts, ("head", (d.vocab_size, d.hidden_size)): 1}.items():
        yield "", f"{role:9} {n:6} x {k:<6} x {count}"
    if d.per_layer_width:
        yield "", f"per-layer embeddings {d.vocab_size} x {d.per_layer_width}, of which a token reads one row"
    by_depth = (f"{plan.bytes_per_token(bits) / 1e6:.0f} MB at {bits} bits" for bits in plan.profile.depth_bits)
    of_all = "" if plan.read_parameters == plan.routed_parameters else f"{plan.read_parameters / 1e6:.0f} M of them, "
    yield "Reads", f"{plan.parameters / 1e6:.0f} M weights; a token reads {of_all}{', '.join(by_depth)}"
    besides = f", and its states {d.state_bytes / 1e6:.1f} MB" if d.state_bytes else ""
    token_kb = d.token_bytes(plan.kv_bits) / 1e3
    yield "Context", f"on the board, each token takes {token_kb:.0f} kB of memory{besides}"
    profiles = " or ".join(map(str, prepared.options.profiles))
    yield "Slices", f"{profiles} in groups of {plan.group_size}, router {prepared.options.router}"
    where = "" if prepared.device == "cpu" else f" of {prepared.device}"
    each = f" in each of {processes.count()} processes" if processes.count() > 1 else ""
    yield (
        "Needs",
        (
            f"about {plan.peak_memory_bytes >> 20} MB of memory{where}{each}, "
            f"and {plan.work_bytes >> 20} MB of disk during calibration"
        ),
    )
    for output, target in outputs.items():
        size_mb = prepared.plans[output].disk_bytes >> 20
        yield "Output", f"{output}, about {size_mb} MB, for {target.name}: {target.description}"
        if output.exists() and not prepared.options.force:
            yield "", "it exists: the export needs --force to replace it, or another --output"
    engines = (engine for target in outputs.values() for engine in target.engines(prepared.options.engines))
    yield "Engines", ", ".join(dict.fromkeys(engines))


def _show_results(prepared: Prepared, manifests: dict[Path, Manifest], plot: Path | None, as_json: bool) -> None:
    if plot is not None:
        from .write.plot import quality_curve

        # All targets share one calibration, and so one curve.
        quality_curve(plot, prepared.source.name, next(iter(manifests.values())).quality)
    if as_json:
        results = [_result_document(prepared, output, manifest) for output, manifest in manifests.items()]
        click.echo(json.dumps(results[0] if len(results) == 1 else results))
        return
    for output, manifest in manifests.items():
        _show_result(output, manifest)


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
    sizes = [(entry.name, _megabytes(entry.size)) for entry in manifest.files]
    click.echo(f"\nWrote {output}")
    click.echo(tables.aligned(("file", "size"), [*sizes, ("all", _megabytes(manifest.total_bytes))], words=("file",)))
    per_token = manifest.weights.bytes_per_token
    read = [(bits, _megabytes(per_token[bits])) for bits in SHOWN_BITS if bits in per_token]
    click.echo("\n" + tables.aligned(("average bits", "weights read per token"), read) + "\n")
    for slices, figures in manifest.calibration.get("slices", {}).items():
        floor, divergence = figures["floor_bits"], figures["kl_divergence"]
        click.echo(f"Slices {slices}: floor {floor:g} bits, mean KL divergence {divergence:.4f} at 4 to 8 bits")
    click.echo(f"Slices {','.join(map(str, manifest.slices))} are written\n")
    quality = manifest.quality
    reference = quality.reference_perplexity
    curve = [
        (
            f"{point.avg_bits_used:.2f}",
            f"{point.kl_divergence:.4f}",
            f"{point.same_top:.1%}",
            f"{point.perplexity:.2f}",
            f"x {point.perplexity / reference:.3f}",
        )
        for point in quality.curve
    ]
    headings = ("average bits", "KL divergence, nats", "same first choice", "perplexity", "over the original's")
    click.echo("On held-back text, against the original model:")
    click.echo(tables.aligned(headings, [*curve, ("original", "0", "100.0%", f"{reference:.2f}", "x 1.000")]))
    click.echo(f"The quality floor is {quality.floor_bits:g} bits; router {manifest.router.kind}")
    click.echo(f"\nCopy the folder to the device and run there:\n  {_next_command(output)}")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"


class _EndedBySignal(BaseException):
    """SIGTERM, SIGHUP or SIGINT, as an exception: temporary folders are removed on its way up."""


def _catch_signals() -> list[signal.Signals]:
    """Raise an exception at a signal that asks for the end.  The list gets the signals that came."""
    came: list[signal.Signals] = []

    def end(number: int, _: object) -> None:
        came.append(signal.Signals(number))
        raise _EndedBySignal(number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        # nohup has SIGHUP ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    return came


def _ignore_signals() -> None:
    """Nothing is left to interrupt.  A signal while Python ends would print a trace."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """Run the command.

    An error is printed as one line and its exit code is returned; 128 and the signal's number when a signal ended it.
    With ``-v`` the log has the trace of an error.
    """
    replace_closed()
    came = _catch_signals()
    try:
        command(standalone_mode=False)
        _ignore_signals()
    except SystemExit:
        raise
    except BaseException as error:
        _ignore_signals()
        message, code = _ended_by(came[0]) if came else _ending(error)
        log.info("%s", message, exc_info=error)
        click.echo(f"mbq-export: {one_line(message)}", err=True)
        sys.exit(code)


def _ended_by(number: signal.Signals) -> tuple[str, int]:
    """Message and exit code after a signal, whatever a library made of its exception."""
    how = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    return f"{how}; run the same command again, and an export goes on from here", 128 + number


def _ending(error: BaseException) -> tuple[str, int]:
    """Message and exit code after an error."""
    if isinstance(error, MbqError):
        return f"error: {error}", error.exit_code
    if isinstance(error, click.ClickException):
        return f"error: {error.format_message()}", 2
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _ended_by(signal.SIGINT)
    return f"error: a fault of mbq-export: {type(error).__name__}: {error}; report it with the trace of -v", 1


if __name__ == "__main__":
    main()
