"""``mbq-export compare``"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from mbq_export.progress import Progress
from mbq_runtime.commands.common import listed

if TYPE_CHECKING:
    from .run import Settings

TOOLS = ("mbq-export", "torch", "transformers", "gptqmodel", "auto-round", "llama-cpp-python", "gguf", "lm-eval")


@click.command("compare", context_settings={"show_default": True})
@click.option("--model", "-m", default="smollm2-135m", help="As for an export.")
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle of this model, to measure beside the others.")
@click.option(
    "--data",
    multiple=True,
    default=["wikipedia"],
    help="UTF-8 text to predict, or a packaged one: wikipedia, news, technical, code, chat, conversation, all; may be "
    "repeated.",
)
@click.option("--methods", help="Sides to measure, such as rtn,gptq,bundle.  [default: all that are installed]")
@click.option("--bits", default="2,3,4", help="Widths of rtn, gptq and autoround.")
@click.option("--avg-bits", default="8,6,5,4,3.5,3", help="Budgets of the bundle.")
@click.option("--group-size", default=64, help="Weights per scale of rtn, gptq and autoround.")
@click.option("--windows", default=24, help="Windows of each text.")
@click.option("--context", default=512, help="Tokens in a window.")
@click.option("--calib-data", metavar="DATA", help="As for an export; what gptq and autoround calibrate on.")
@click.option("--calib-windows", default=64, help="Windows they calibrate on.")
@click.option("--last-words", default=200, help="Passages of the task of last words; 0 leaves it out.")
@click.option("--lm-eval", "tasks", help="Zero-shot tasks to run on every side (needs lm-eval), such as arc_easy.")
@click.option("--lm-eval-limit", type=int, help="Examples of each task.  [default: all]")
@click.option("--lm-eval-path", type=click.Path(path_type=Path), help="A folder of more task files.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder for results.json and table.md.")
@click.option("--seed", default=0, help="Seed of the libraries.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    model: str, output: Path | None, as_json: bool, methods: str | None, bits: str, avg_bits: str, **options: Any
) -> None:
    """Hold a bundle against other ways to store the same model, in one harness.

    Perplexity, KL divergence to float32 (mean, 99 % and 99.9 %), agreement with its first choice, and bytes, on the
    same windows of the same tokens; +- is the standard error, for ratios that of the paired differences over windows.
    chat and conversation are what the original itself says to held-back prompts: it writes them once.
    """
    from .run import Settings, prepare, run

    tasks = options.pop("tasks")
    settings = Settings(
        model=model,
        methods=tuple(listed("--methods", methods, str)) if methods else None,
        bits=tuple(listed("--bits", bits, int)),
        avg_bits=tuple(listed("--avg-bits", avg_bits, float)),
        tasks=tuple(listed("--lm-eval", tasks, str)) if tasks else (),
        **options,
    )
    prepared = prepare(settings)
    for left_out in prepared.left_out:
        click.echo(f"mbq-export compare: {left_out}", err=True)
    facts = _facts(settings)
    with TemporaryDirectory(prefix="mbq-compare-") as folder, Progress(quiet=as_json) as progress:
        for results in run(prepared, Path(folder), progress):
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                (output / "results.json").write_text(json.dumps(results.document(facts), indent=1) + "\n")
                (output / "table.md").write_text(results.markdown() + "\n", encoding="utf-8")
    click.echo(json.dumps(results.document(facts)) if as_json else results.markdown())


def _facts(settings: Settings) -> dict[str, Any]:
    from mbq_export.versions import installed

    return {
        "model": settings.model,
        "group_size": settings.group_size,
        "context": settings.context,
        "calib_data": settings.calib_data,
        "calib_windows": settings.calib_windows,
        "seed": settings.seed,
        "tools": installed(TOOLS),
    }
