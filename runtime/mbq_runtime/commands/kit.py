"""``mbq kit``"""

from __future__ import annotations

import json
from pathlib import Path

import click

from mbq_runtime.errors import UsageError

from .common import FiniteRange, bundle_argument
from .trust import note_code, trust_option


@click.command("kit")
@bundle_argument
@click.option("--minutes", type=FiniteRange(0.05, 240), default=20.0, help="Time for all measurements.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("report.json"), help="File of the report.")
@click.option("-t", "--threads", type=int, help="Most processor threads to try.  [default: one per big core]")
@click.option("--yes", is_flag=True, help="Write the report without asking.")
@trust_option
def command(bundle: Path, minutes: float, output: Path, threads: int | None, yes: bool, trust: bool) -> None:
    """Measure this board with BUNDLE, and write one report to send.

    The report has the speed at every budget and number of threads, watts, a heating and a cooling curve, and a short
    closed loop.  Each stage ends when the board is at its limit.  A second call goes on after a stage that is finished.
    What identifies the board is shown before the report is written.  "mbq simulate REPORT" uses it as a board.
    """
    from mbq_runtime import kit
    from mbq_runtime.engine import Engine
    from mbq_runtime.sensing.sensors import Sensors

    if output.is_dir():
        raise UsageError(f"{output}: a folder, needed a file; give another --output")
    if not output.parent.is_dir():
        raise UsageError(f"{output}: the folder {output.parent} does not exist; create it, or give another --output")
    note_code(bundle, trust=trust)
    engine, sensors = Engine.load(bundle, threads=threads), Sensors()
    report = kit.empty(engine, sensors.read)
    part = output.with_name(output.name + ".part")
    if part.is_file() and (finished := kit.finished_stages(part, report)):
        report["stages"] = finished
        click.echo(f"going on after {', '.join(finished)}", err=True)
    board = kit.Board(engine, sensors.read)
    report = kit.measure(
        report, board, 60 * minutes, lambda now: kit.write(now, part), lambda line: click.echo(line, err=True)
    )
    shown = {key: value for key, value in report.items() if key != "stages"}
    click.echo(json.dumps(shown, indent=1, ensure_ascii=False))
    click.echo("Besides these lines the report has measurements only.", err=True)
    if not yes and not click.confirm(f"Write {output}?", default=True, err=True):
        return
    kit.write(report, output)
    part.unlink(missing_ok=True)
