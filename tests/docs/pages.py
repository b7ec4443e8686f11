"""What the pages of the documentation hold: commands, Python code, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "results/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SHELL = ("", "sh", "bash", "console")
"""Languages of fences that hold shell commands; indented blocks do so too."""
_FENCE = re.compile(r" *```(\w*)$")


@dataclass(frozen=True)
class Block:
    """A block of code.

    page: file, relative to the repository
    line: 1-based, of its first line of code
    language: of the fence; "" where there is none, and for indented blocks
    text: the code, without its indentation
    """

    page: str
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Yield every fenced and every indented block of a page, in order."""
    name, lines, i = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8").splitlines(), 0
    while i < len(lines):
        start = i
        if fence := _FENCE.match(lines[i]):
            i = start = start + 1
            while lines[i].strip() != "```":
                i += 1
            language = fence[1]
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            while i < len(lines) and lines[i].startswith("    "):
                i += 1
            language = ""
        else:
            i += 1
            continue
        indent = min((len(line) - len(line.lstrip()) for line in lines[start:i] if line.strip()), default=0)
        yield Block(name, start + 1, language, "\n".join(line[indent:] for line in lines[start:i]))
        i += 1


def commands(block: Block) -> list[str]:
    """Split a block of shell lines into commands: no comments, no prompts, one for each part of ``a && b``."""
    joined = block.text.replace("\\\n", " ")
    lines = [re.sub(r"(^|\s+)#.*$", "", line).strip().removeprefix("$ ") for line in joined.splitlines()]
    return [" ".join(part.split()) for line in lines if line for part in line.split("&&")]


def shell_commands() -> dict[str, str]:
    """Every shell command of the documentation -> where it first stands, as page:line."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language in SHELL:
                for command in commands(block):
                    found.setdefault(command, f"{block.page}:{block.line}")
    return found


def python_blocks() -> list[Block]:
    """Every block of Python code of the documentation."""
    return [block for page in PAGES for block in blocks(page) if block.language == "python"]
