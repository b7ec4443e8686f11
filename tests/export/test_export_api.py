"""``mbq_export.export``, the Python API, does what the command does."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from exporting import digests
from tiny_models import write_checkpoint
from warm_start import Running

import mbq_export
from mbq_export import export
from mbq_export.cli import command, main
from mbq_export.options import ROUTER_CHOICES
from mbq_export.routing.kinds import ROUTERS
from mbq_runtime.bundle import manifest
from mbq_runtime.errors import UsageError

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


def test_the_function_writes_what_the_command_writes(model: Path, calibration_text: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    by_function, by_command = tmp_path / "function", tmp_path / "command"
    (made,) = export(
        model, ["portable"], output=by_function, calib_data=str(calibration_text), calib_tokens=1024,
        method="rtn", router="norm", progress=lambda what, done, total: told.append((what, done, total)),
    )  # fmt: skip
    arguments = ["--target", "portable", "--model", model, "--output", by_command, "--calib-data", calibration_text]
    arguments += ["--calib-tokens", 1024, "--method", "rtn", "--router", "norm", "--json"]
    command([str(argument) for argument in arguments], standalone_mode=False)
    assert digests(by_function) == digests(by_command)
    assert made == manifest.read(by_function)

    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert stages[0] == "loading the model"
    assert stages[-1] == "checking the bundle against the original"
    assert told[-1][1] == told[-1][2], "the last stage is complete"
    assert all(0 <= done <= total for _, done, total in told)


def test_the_command_has_the_defaults_of_the_function() -> None:
    of_function = {name: parameter.default for name, parameter in inspect.signature(export).parameters.items()}
    of_command = command.make_context("mbq-export", []).params
    assert of_function.keys() - of_command.keys() == {"progress"}
    for name in of_function.keys() & of_command.keys():
        assert of_command[name] == of_function[name], name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"targets": ["commodore"]}, "commodore"),
        ({"targets": "arm64"}, "targets 'arm64': needed a list of names, such as ['arm64']"),
        ({"targets": []}, "targets: there is none"),
        ({"engine": "steam"}, "--engine 'steam' is not known; choose one of: onnx, tvm, both"),
        ({"method": "guess"}, "--method 'guess' is not known; choose one of: rtn, quick, nested, learned"),
        ({"router": "guess"}, "--router 'guess' is not known"),
        ({"group_size": 48}, "--group-size '48' is not known; choose one of: auto, 32, 64, 128"),
        ({"activation_bits": 4}, "--activations 4 is not known; choose one of: 8, 16"),
        ({"slices": "3,3"}, "3,3"),
    ],
)
def test_unknown_values_are_refused_in_one_line(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as error:
        export("nowhere", **arguments)  # type: ignore[arg-type]
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dry_run_where_there_is_a_bundle(
    model: Path, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, other = tmp_path / "there", tmp_path / "other"
    there.mkdir()
    (there / "manifest.json").write_text("{}")
    asked = ["--target", "portable", "--model", str(model), "--calib-data", str(calibration_text)]
    for output, more, exists in ((there, [], True), (there, ["--force"], True), (other, [], False)):
        arguments = [*asked, "--output", str(output), "--dry-run", *more]
        command(arguments, standalone_mode=False)
        said = capsys.readouterr().out
        assert ("it exists: the export needs --force" in said) == (exists and not more)
        command([*arguments, "--json"], standalone_mode=False)
        (found,) = json.loads(capsys.readouterr().out)["outputs"]
        assert found["exists"] is exists
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "manifest.json"]
    assert (there / "manifest.json").read_text() == "{}"
    with pytest.raises(UsageError, match="--force to replace it"):
        command([*asked, "--output", str(there)], standalone_mode=False)


def test_every_router_can_be_asked_for() -> None:
    assert ("auto", *ROUTERS) == ROUTER_CHOICES


def test_importing_the_package_is_quick() -> None:
    heavy = "{'torch', 'transformers', 'onnx', 'tvm', 'numpy'}"
    program = f"import sys, mbq_export; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mbq-export", "--version"])
    main()
    assert mbq_export.__version__ in capsys.readouterr().out


def test_verbose_shows_the_log(model: Path, calibration_text: Path, tmp_path: Path) -> None:
    arguments = ["--target", "portable", "--model", model, "--output", tmp_path / "b", "--dry-run"]
    arguments += ["--calib-data", calibration_text]
    for verbose, lines in (([], 0), (["-v"], 1)):
        running = Running([*map(str, arguments), *verbose])
        _, said = running.communicate()
        assert running.returncode == 0, said
        assert said.count("mbq_export.prepare: llama: groups of 64, calibrated on ") == lines
