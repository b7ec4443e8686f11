"""Several processes calibrate what one does, the same every time, and go on after a kill."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import shared_work
import torch
from exporting import digests, export, kill_all, run
from tiny_models import TINIEST, write_checkpoint
from warm_start import COMMAND, Running

from mbq_export import methods
from mbq_export.model.blocks import fast_dtype
from mbq_runtime.bundle import manifest

pytestmark = pytest.mark.heavy

WORK = Path(shared_work.__file__)


def together(command: list[str], processes: int = 2) -> list[str]:
    """``command``, a Python one, by several processes on this machine."""
    python, *rest = command
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *rest]


def forked(command: list[str], processes: int = 2) -> list[Running]:
    """The same for an export, with the variables that ``torchrun`` sets, and without loading libraries again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return [
        Running(command[len(COMMAND) :], environment={**shared, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(processes)
    ]


def test_shares_add_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint(tmp_path / "model", "llama")
    alone, shared = tmp_path / "alone.npz", tmp_path / "shared.npz"
    monkeypatch.setitem(methods.METHODS, "nested", methods.METHODS["nested"])  # the work changes it
    shared_work.main(str(model), str(alone))
    run(together([sys.executable, str(WORK), str(model), str(shared)]))
    # Passes in bfloat16 make more of a last digit.
    summed, passed = (5e-4, 5e-4) if fast_dtype(torch.device("cpu")) == torch.float32 else (2e-3, 0.02)
    with np.load(alone) as one, np.load(shared) as two:
        assert (one["processes"], two["processes"]) == (1, 2)
        assert one.files == two.files
        for name in set(one.files) - {"processes"}:
            assert one[name].shape == two[name].shape, name
            of_one, of_two = one[name].astype(np.float64), two[name].astype(np.float64)
            apart = np.linalg.norm(of_one - of_two) / np.linalg.norm(of_one)
            # Sums in another order: a code on the edge of its cell may fall to the other side, which feedback spreads.
            limit = passed if name.startswith(("in ", "energy ", "change ", "router ")) else summed
            if name.startswith("sliced"):
                limit = 0.01 if "layers.0." in name else 0.15
            assert apart < limit, f"{name}: {apart}"


@pytest.mark.slow
def test_processes_calibrate_together_the_same_every_time(tmp_path: Path, calibration_text: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "llama", **TINIEST)
    options = ["--tune-steps", "22"]
    said = run(together(export(model, calibration_text, tmp_path / "a" / "bundle", *options)))
    assert "memory in each of 2 processes" in said
    assert said.count("slicing blocks ...") == said.count("Wrote ") == 1  # one of them speaks
    facts = manifest.read(tmp_path / "a" / "bundle")
    assert facts.calibration["processes"] == 2
    assert all(0.9 < point.perplexity / facts.quality.reference_perplexity < 1.1 for point in facts.quality.curve)

    work = tmp_path / "b" / ".model.3122.calibration"
    again = export(model, calibration_text, tmp_path / "b" / "bundle", *options)
    for step in ("model.layers.0", methods.TUNE_GAINS.name):
        kill_all(forked(again), (work / f"{step}.safetensors").exists)
    first, second = forked(again)
    assert "resuming after" in "".join(first.communicate())
    second.communicate()
    assert first.returncode == second.returncode == 0
    assert digests(tmp_path / "a" / "bundle") == digests(tmp_path / "b" / "bundle")
    # None of them leaves anything behind.
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["bundle"]


def test_a_process_whose_neighbour_has_ended_says_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from mbq_export import processes\n"
        "from mbq_runtime.errors import MbqError\n"
        "with processes.connected():\n"
        "    assert processes.gathered([processes.index()]) == [0, 1]\n"
        "    if processes.index():\n"
        "        os._exit(0)\n"
        "    try:\n"
        "        processes.gathered([0])\n"
        "    except MbqError as error:\n"
        f"        open({str(tmp_path / 'said')!r}, 'w').write(str(error))\n"
    )
    run(together([sys.executable, str(script)]))
    assert "process 0 of 2: another one has ended" in (tmp_path / "said").read_text()
