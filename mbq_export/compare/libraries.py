"""Published methods, run by the libraries that maintain them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_export.model.checkpoint import Checkpoint
from mbq_runtime.errors import ModelError

from .library_worker import Request


def write_inputs(checkpoint: Checkpoint, windows: NDArray[np.int64], folder: Path) -> None:
    """Write what a library needs: the model as a Hugging Face folder, and windows to calibrate on.

    Args:
        checkpoint: the model.
        windows: int64 [windows, context] tokens.
        folder: an empty folder.
    """
    from safetensors.torch import save_file

    model = folder / "model"
    model.mkdir()
    # Not save_pretrained: transformers refuses it for a model that was read from GGUF.
    config = json.loads(checkpoint.model.config.to_json_string())
    config.pop("quantization_config", None)
    (model / "config.json").write_text(json.dumps(config))
    checkpoint.model.generation_config.save_pretrained(model)
    checkpoint.tokenizer.save_pretrained(model)
    tensors = {name: value.detach().contiguous() for name, value in checkpoint.model.named_parameters()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    np.save(folder / "windows.npy", windows)


def quantise(request: Request, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Quantise the model with a library.

    Args:
        request: the library and its settings.
        folder: as ``write_inputs`` left it.

    Returns:
        By layer: decoded float32 weights [N, K], and the bytes that the layer takes.

    Raises:
        ModelError: the library fails; the message has its last line.
    """
    from safetensors.torch import load_file

    (folder / "request.json").write_text(json.dumps(asdict(request)))
    log = folder / f"{request.library}.log"
    with log.open("wb") as sink:
        command = [sys.executable, "-m", f"{__package__}.library_worker", str(folder)]
        status = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or [f"exit code {status}"]
        raise ModelError(
            f"{request.library} at {request.bits} bits failed: {last[0].strip():.200}; "
            "leave it out with --methods, or update its library"
        )
    return load_file(folder / "weights.safetensors"), json.loads((folder / "sizes.json").read_text())
