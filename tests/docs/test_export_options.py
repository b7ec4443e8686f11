"""docs/export-options.md has every option of the command, and says how the keywords of the function differ."""

from __future__ import annotations

import inspect
import re

import click
import pytest
from pages import ROOT

from mbq_export import export
from mbq_export.cli import command

PAGE = (ROOT / "docs" / "export-options.md").read_text(encoding="utf-8")
CONTEXT = click.Context(command, info_name="mbq-export", **command.context_settings)
OPTIONS = [one for one in command.get_params(CONTEXT) if isinstance(one, click.Option)]


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def long_name(option: click.Option) -> str:
    return next(name for name in option.opts if name.startswith("--"))


def test_the_table_has_every_option_and_no_other() -> None:
    cells = [row.split("|")[1] for row in section("Options").splitlines() if row.startswith("| `-")]
    named = [name for cell in cells for name in re.findall(r"`(-[\w-]+)`", cell)]
    assert len(set(named)) == len(named)
    assert {name for name in named if name.startswith("--")} == {long_name(option) for option in OPTIONS}
    assert set(named) <= {name for option in OPTIONS for name in option.opts}


@pytest.mark.parametrize("option", OPTIONS, ids=long_name)
def test_the_help_has_the_option(option: click.Option) -> None:
    assert option.get_help_record(CONTEXT) is not None


def test_keywords_have_the_names_of_options_but_for_those_that_are_listed() -> None:
    keywords, text = list(inspect.signature(export).parameters), " ".join(section("From Python").split())
    names = {long_name(option): option.name for option in OPTIONS}
    differ = {
        name: keyword for name, keyword in names.items()
        if keyword in keywords and keyword != name.removeprefix("--").replace("-", "_")
    }  # fmt: skip
    assert dict(re.findall(r"`(--[\w-]+)` is `(\w+)`", text)) == differ
    without = re.search(r"have no keyword: (.+?)\. ", text)
    assert without is not None
    assert set(re.findall(r"`(--[\w-]+)`", without[1])) == {
        name for name, keyword in names.items() if keyword not in keywords
    }
    assert re.findall(r"keyword `(\w+)` has no option", text) == [
        name for name in keywords if name not in names.values()
    ]


def test_the_default_of_the_calibration_data_is_that_of_the_page() -> None:
    (option,) = [option for option in OPTIONS if option.name == "calib_data"]
    default = re.search(r"\[default: (.+)\]", option.help or "")
    assert default is not None
    for shown, described in (("Wikipedia", "English Wikipedia"), ("code", "Python code"), ("replies", "answers")):
        assert shown in default[1]
        assert described in section("Calibration data")
