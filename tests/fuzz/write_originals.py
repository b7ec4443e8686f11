"""Exports a tiny model, whose bundle is then changed:  python write_originals.py FOLDER TARGET"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_models import TINIEST, write_checkpoint

from mbq_export.cli import main

if __name__ == "__main__":
    folder, target = Path(sys.argv[1]), sys.argv[2]
    model = write_checkpoint(folder / f"model-{target}", "llama", **{**TINIEST, "hidden_size": 64})
    text = folder / "text.txt"
    text.write_text("The tide turns twice a day, and twice a day the boats leave the harbour. " * 200)
    sys.argv[1:] = [
        "--model",
        str(model),
        "--output",
        str(folder / target),
        "--calib-data",
        str(text),
        "--target",
        target,
    ]
    sys.argv += ["--calib-tokens", "512", "--method", "rtn", "--router", "norm"]
    sys.argv += ["--engine", "both"] if target == "host" else []
    main()
