"""Runs the page's modules in Node, for what needs no browser."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import needs

REPO = Path(__file__).parents[2]
WEB = REPO / "web"


def packages() -> Path:
    """The folder of the page's sources, with the packages that they import."""
    if not (WEB / "node_modules" / "esbuild").is_dir():
        needs.missing("no packages of npm in web/: make web")
    return WEB


def run(script: str, given: Any) -> Any:
    """Run a script in Node.

    Args:
        script: body of an async function of ``given``, which returns what JSON can hold.  It imports from "./src/".
        given: what JSON can hold.

    Returns:
        What the script returned.
    """
    program = (
        "let text = ''; for await (const part of process.stdin) text += part;\n"
        f"const main = async given => {{ {script} }};\n"
        "console.log(JSON.stringify(await main(JSON.parse(text))));\n"
    )
    done = subprocess.run(
        [needs.program("node"), "--no-warnings", "--input-type=module", "--eval", program],
        input=json.dumps(given), cwd=packages(), capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
