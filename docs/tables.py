"""Write the tables of README.md and docs/ from results/*.json.

    python docs/tables.py            # rewrite every table
    python docs/tables.py --check    # exit with 1 if a table differs from its results

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.  NAME is a key of ``TABLES``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]
Cells = list[list[str]]


@dataclass(frozen=True)
class Table:
    """One generated table.

    source: name of the file in results/, without its suffix
    cells: makes the heading row and the body rows from the result rows
    """

    source: str
    cells: Callable[[list[Row]], Cells]


def load(name: str) -> dict[str, Any]:
    """Read results/NAME.json.

    Args:
        name: file name without the suffix.

    Returns:
        The file's object: facts about the measurement, and ``rows``.
    """
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _cell(value: Any, digits: int | None) -> str:
    return _number(value, digits) if digits is not None else "-" if value is None else str(value)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _columns(**columns: tuple[str, int | None]) -> Callable[[list[Row]], Cells]:
    """A table of one line a result row.  columns: key in the row -> (heading, digits; None for text)."""

    def cells(rows: list[Row]) -> Cells:
        heading = [title for title, _ in columns.values()]
        body = [[_cell(row[key], digits) for key, (_, digits) in columns.items()] for row in rows]
        return [heading, *body]

    return cells


def _by_bits(
    label: str, title: str, cell: Callable[[Row], str], *, commits: bool = False
) -> Callable[[list[Row]], Cells]:
    """A table of one line a ``label`` and one column a budget."""

    def cells(rows: list[Row]) -> Cells:
        budgets = list(dict.fromkeys(row["asked_bits"] for row in rows))
        heading = [title, *(f"{bits:g} bits" for bits in budgets), *(["commit"] if commits else [])]
        body = []
        for name in dict.fromkeys(row[label] for row in rows):
            of = {row["asked_bits"]: row for row in rows if row[label] == name}
            line = [name, *(cell(of[bits]) if bits in of else "-" for bits in budgets)]
            body.append([*line, str(next(iter(of.values()))["commit"] or "unknown")] if commits else line)
        return [heading, *body]

    return cells


def _only(keep: Callable[[Row], bool], cells: Callable[[list[Row]], Cells]) -> Callable[[list[Row]], Cells]:
    return lambda rows: cells([row for row in rows if keep(row)])


def _by_size(cells: Callable[[list[Row]], Cells]) -> Callable[[list[Row]], Cells]:
    return lambda rows: cells(sorted(rows, key=lambda row: -row["mb_per_token"]))


def _router(row: Row) -> str:
    if row["excess_percent"] is None:
        return _number(row["perplexity"], 2)
    return f"{row['perplexity']:.2f} ({row['excess_percent']:.1f} ± {row['excess_stderr_percent']:.1f} %)"


def _router_kl(row: Row) -> str:
    if row["excess_percent"] is None:
        return _number(row["kl_nats"], 3)
    return f"{row['kl_nats']:.3f} ({row['excess_percent']:.0f} ± {row['excess_stderr_percent']:.0f} %)"


def _beside_first(row: Row) -> str:
    return f"{row['mean_kl_nats']:.5f} ({row['kl_over_first']:.2f} ± {row['over_first_stderr']:.2f})"


def _stand_ins(rows: list[Row]) -> Cells:
    named = [row | {"stand_in": f"{row['family']} ({row['float32_perplexity']:.1f})"} for row in rows]
    return _by_bits("stand_in", "family (perplexity of float32)", _beside_first)(named)


def _with_error(rows: list[Row]) -> list[Row]:
    return [row | {"ratio": f"{row['perplexity_ratio']:.3f} ± {row['ratio_stderr']:.3f}"} for row in rows]


def _simulated(rows: list[Row]) -> list[Row]:
    demand = {None: "without pause"}
    return [
        row
        | {
            "asked": demand.get(row["demand_tokens_per_s"], f"{row['demand_tokens_per_s']} tokens/s"),
            "throttled": f"{100 * row['above_throttle_share']:.0f} %",
        }
        for row in rows
        if row["policy"] in ("fixed 8", "auto")
    ]


def _beside_oracle(rows: list[Row]) -> list[Row]:
    """One row a situation, and one of all.  The earlier controller is the last policy of a situation."""
    found = []
    names = list(dict.fromkeys(row["situation"] for row in rows))
    for name, of in [*((name, [row for row in rows if row["situation"] == name]) for name in names), ("all", rows)]:
        oracle, auto, before = (
            [row for row in of if row["policy"] == policy] for policy in dict.fromkeys(row["policy"] for row in of)
        )
        figures = {"situation": name}
        for label, part in (("oracle", oracle), ("auto", auto), ("before", before)):
            figures[f"{label}_kl"] = sum(row["kl_seconds"] for row in part)
            figures[f"{label}_missed"] = sum(row["missed_s"] for row in part)
            figures[f"{label}_above"] = sum(row["above_s"] for row in part)
        found.append(figures)
    return found


def _change(row: Row) -> str:
    first, then = row["first_bits"], row["then_bits"]
    return f"{first:g}" if then is None else f"{first:g}, then {then:g}"


_KL = {
    "file": ("file", None),
    "mb_per_token": ("MB a token", 1),
    "mean_kl_nats": ("mean KL, nats", 4),
    "same_top": ("same top token", 3),
    "perplexity_ratio": ("perplexity / float32", 3),
}
_DECODE = {
    "side": ("engine and file", None),
    "smollm2_decode": ("SmolLM2-135M decode", 0),
    "smollm2_prompt_128": ("prompt of 128", 0),
    "llama_1b_decode": ("llama-1b decode", 1),
    "llama_1b_prompt_128": ("prompt of 128", 0),
}
_SHORT = (
    "mbq, 2 bits",
    "mbq, 4 bits",
    "mbq, 8 bits",
    "llama.cpp Q2_K",
    "llama.cpp Q4_0",
    "llama.cpp Q4_K_M",
    "llama.cpp Q8_0",
)

TABLES = {
    "reaches": Table("kl-divergence", _only(lambda row: row["kind"] != "autoround", _by_size(_columns(**_KL)))),
    "kl-divergence": Table(
        "kl-divergence",
        _by_size(
            _columns(
                **_KL,
                kl_wiki=("KL, Wikipedia", None),
                kl_news=("KL, news", None),
                kl_technical=("KL, technical", None),
                kl_code=("KL, code", None),
                kl_chat=("KL, chat", None),
            )
        ),
    ),
    "kl-rotated": Table("kl-rotated", _by_size(_columns(**_KL))),
    "kl-learned": Table("kl-learned", _by_size(_columns(**_KL))),
    "kl-plain-rounding": Table(
        "kl-plain-rounding",
        _columns(
            asked_bits=("bits", 0),
            activation_bits=("activation bits", 0),
            mb_per_token=("MB a token", 1),
            mean_kl_nats=("mean KL, nats", 4),
            same_top=("same top token", 3),
            perplexity_ratio=("perplexity / float32", 3),
        ),
    ),
    "perplexity": Table(
        "perplexity", _by_bits("row", "perplexity / float32", lambda r: _number(r["perplexity_ratio"], 3), commits=True)
    ),
    "routers-3122": Table("routers-3122", _by_bits("router", "text and router", _router_kl)),
    "routers-2222": Table("routers-2222", _by_bits("router", "router", _router)),
    "speed-short": Table("speed-avx2", _only(lambda row: row["side"] in _SHORT, _columns(**_DECODE))),
    "speed-avx512": Table(
        "speed-avx512",
        _columns(
            **_DECODE, smollm2_prompt_512=("SmolLM2-135M prompt of 512", 0), llama_1b_prompt_512=("llama-1b of 512", 0)
        ),
    ),
    "speed-avx2": Table("speed-avx2", _columns(**_DECODE, smollm2_prompt_512=("SmolLM2-135M prompt of 512", 0))),
    "speed": Table(
        "speed",
        _columns(
            side=("engine and file", None),
            smollm2_decode=("SmolLM2-135M decode", 0),
            smollm2_prompt_128=("prompt of 128", 0),
            smollm2_prompt_512=("of 512", 0),
            llama_1b_decode=("llama-1b decode", 0),
            llama_1b_decode_fast_moment=("fast moment", 0),
            llama_1b_prompt_128=("prompt of 128", 0),
            llama_1b_prompt_512=("of 512", 0),
        ),
    ),
    "stand-ins": Table("stand-ins", _stand_ins),
    "compare": Table(
        "compare",
        lambda rows: _columns(
            side=("file", None),
            bits_per_block_weight=("bits a weight in the blocks", 2),
            mb_per_token=("MB a token", 1),
            ratio=("perplexity / float32", None),
            mean_kl_nats=("mean KL, nats", 3),
            same_top=("same top token", 3),
        )(_with_error(rows)),
    ),
    "disturbances": Table(
        "disturbances",
        _columns(
            disturbance=("disturbance", None),
            figure=("figure", None),
            median=("median", 2),
            least=("least", 2),
            most=("most", 2),
            needed=("needed", None),
            runs=("runs", 0),
            commit=("commit", None),
        ),
    ),
    "simulated-hour": Table(
        "simulated-hour",
        lambda rows: _columns(
            board=("board", None),
            asked=("asked", None),
            policy=("policy", None),
            tokens_per_s=("tokens/s", 1),
            mean_bits=("mean bits", 2),
            joules_per_token=("J/token", 3),
            throttled=("time throttled", None),
        )(_simulated(rows)),
    ),
    "given-away": Table(
        "given-away",
        lambda rows: _columns(
            situation=("situation", None),
            oracle_kl=("oracle, nat s", 1),
            auto_kl=("`auto`", 1),
            before_kl=("`auto` before", 1),
            auto_missed=("goal missed, s", 0),
            before_missed=("before", 0),
            auto_above=("above the throttle point, s", 0),
            before_above=("before", 0),
        )(_beside_oracle(rows)),
    ),
    "boards": Table(
        "boards",
        _columns(
            board=("board", None),
            origin=("origin", None),
            model=("model", None),
            ceiling_tokens_per_s=("tokens/s at 8 bits", 1),
            floor_tokens_per_s=("at the floor", 1),
            busy_w=("W", 1),
            ceiling_joules_per_token=("J/token at 8 bits", 3),
            measured_tokens_per_s=("closed loop, tokens/s", 1),
            simulated_tokens_per_s=("simulated", 1),
            measured_bits=("closed loop, bits", 2),
            simulated_bits=("simulated", 2),
        ),
    ),
    "replies": Table("replies", _columns(bits=("bits", 1), reply=("reply", None))),
    "calibration-time": Table(
        "calibration-time",
        _columns(
            method=("method", None),
            slices=("slices", None),
            text=("calibrated on", None),
            machine=("machine", None),
            minutes=("minutes", 1),
        ),
    ),
    "format-2": Table(
        "format-2",
        _columns(
            bits=("bits", 0),
            mb_before=("MB a token, before", 1),
            mb_now=("now", 1),
            kl_before=("KL, before", 4),
            kl_now=("now", 4),
            cpu_ms_before=("processor ms, before", 2),
            cpu_ms_now=("now", 2),
            time_ratio=("now / before", 3),
        ),
    ),
    "browser-loading": Table(
        "browser",
        _only(
            lambda row: "event" in row,
            lambda rows: _columns(event=("event", None), megabytes=("MB that have come", 1), percent=("of all, %", 1))(
                [row | {"percent": 100 * row["share"]} for row in rows]
            ),
        ),
    ),
    "browser-replies": Table(
        "browser",
        _only(
            lambda row: "text" in row,
            lambda rows: _columns(
                bits=("bits", None), tokens=("tokens", 0), equal=("equal to Python's", 0), text=("reply", None)
            )([row | {"bits": _change(row)} for row in rows]),
        ),
    ),
    "first-words": Table(
        "first-words",
        _columns(
            event=("event", None),
            ceiling_bits=("ceiling, bits", 0),
            megabytes=("MB that have come", 1),
            share_percent=("of all, %", 1),
            token=("before token", 0),
        ),
    ),
    "arm-static": Table(
        "arm-static",
        _columns(side=("kernel", None), depth_bits=("bits", 0), weight_bytes_per_cycle=("weight bytes a cycle", 1)),
    ),
    "arm-instructions": Table(
        "arm-instructions",
        _columns(
            activation_bits=("activation bits", 0),
            depth_bits=("bits", 0),
            million_instructions=("million instructions", 0),
        ),
    ),
    "long-context": Table(
        "long-context",
        _columns(
            model=("model", None),
            side=("engine, keys and values", None),
            bits=("average bits", 0),
            behind=("tokens behind", 0),
            token_ms=("a token, ms", 2),
            token_of_empty=("speed of empty", 2),
            prompt_ms=("prompt of 128, ms", 0),
            prompt_of_empty=("speed of empty", 2),
        ),
    ),
    "few-tokens": Table(
        "few-tokens",
        _columns(
            engine=("engine", None),
            bits=("average bits", 0),
            one_token_ms=("one token, ms", 1),
            **{f"tokens_{count}": (f"{count} tokens", 2) for count in (2, 4, 8, 16, 32)},
        ),
    ),
    "router-cost": Table(
        "router-cost",
        _columns(
            router_width=("router width", 0),
            model=("model", None),
            byte_share_percent=("bytes, %", 1),
            time_share_percent=("time, %", 1),
        ),
    ),
    "install-size": Table(
        "install-size",
        _columns(platform=("platform", None), wheels_mb=("wheels, MB", 1), unpacked_mb=("unpacked, MB", 1)),
    ),
    "attacks": Table(
        "attacks",
        _columns(
            command=("command", None),
            attacks=("attack files", 0),
            refused_in_one_line=("refused in one line", 0),
            most_processor_s=("most processor time, s", 2),
            slowest=("by", None),
            most_mb=("most memory, MB", 0),
            largest=("by", None),
        ),
    ),
    "fuzz": Table(
        "fuzz",
        _columns(
            input=("input", None),
            cases=("cases", 0),
            refused=("refused", 0),
            accepted=("accepted", 0),
            undecided=("undecided", 0),
            faults=("faults", 0),
            slowest_refusal_s=("slowest refusal, s", 1),
            commit=("commit", None),
        ),
    ),
}
"""Every table, by the name in its marker."""


def _markdown(cells: Iterable[list[str]]) -> str:
    heading, *body = (f"| {' | '.join(line)} |" for line in cells)
    columns = heading.count(" | ") + 1
    return "\n".join([heading, "|" + "---|" * columns, *body])


def _caption(result: dict[str, Any], source: str, page: Path) -> str:
    """Where the table comes from: commit, machine, raw file."""
    by_row = any(row.get("commit") for row in result["rows"])
    commit = result["commit"] or ("by row" if by_row else "unknown")
    machines = any(row.get("machine") for row in result["rows"])
    machine = result["machine"] or ("by row" if machines else "unknown")
    raw = Path(os.path.relpath(RESULTS / f"{source}.json", page.parent)).as_posix()
    return f"Commit: {commit}. Machine: {machine}. Raw: [{source}.json]({raw})."


def render(name: str, page: Path) -> str:
    """Make the markdown of one table.

    Args:
        name: key of ``TABLES``.
        page: markdown file that holds the table; the link to the raw file is relative to it.

    Returns:
        The table and a line on its origin, each ended by a line break.

    Raises:
        SystemExit: no table has this name.
    """
    if name not in TABLES:
        raise SystemExit(f"{page}: no table {name!r}; needed one of {', '.join(TABLES)}")
    table = TABLES[name]
    result = load(table.source)
    return f"{_markdown(table.cells(result['rows']))}\n\n{_caption(result, table.source, page)}\n"


def pages() -> list[Path]:
    """List the markdown files that may hold tables: README.md and all of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def updated(page: Path) -> str:
    """Make the text of a page with fresh tables.

    Args:
        page: markdown file.

    Returns:
        The page's text; the file is not changed.
    """
    text = page.read_text(encoding="utf-8")
    return _MARKED.sub(lambda found: found[1] + render(found[2], page) + found[3], text)


def main() -> None:
    """Rewrite the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table differs")
    check = parser.parse_args().check
    stale = [page for page in pages() if updated(page) != page.read_text(encoding="utf-8")]
    for page in stale:
        if check:
            sys.stderr.write(f"{page.relative_to(ROOT)}: a table differs from results/; run python docs/tables.py\n")
        else:
            page.write_text(updated(page), encoding="utf-8")
    if check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
