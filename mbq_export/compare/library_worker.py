"""Runs a quantisation library in a process of its own: ``python -m mbq_export.compare.library_worker FOLDER``.

These libraries change transformers and torch when they are imported, and they print.  The folder holds ``model``
(Hugging Face), ``windows.npy`` (int64 [windows, context]) and ``request.json``.  The worker writes
``weights.safetensors``, each layer's weight [N, K] as the library decodes it, and ``sizes.json``, the bytes of each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .weights import HALF_BYTES, rounded_bytes

AUTOROUND_STEPS = 200
"""The library's default."""
_BATCH = 4


@dataclass(frozen=True)
class Request:
    """What a library is asked to do.

    library: a key of ``LIBRARIES``; bits: bits per weight; group_size: weights per scale; seed: of random numbers.
    """

    library: str
    bits: int
    group_size: int
    seed: int


Quantised = dict[str, tuple[torch.Tensor, int]]
"""Layer name -> decoded weight [N, K], bytes stored."""


def _gptq(folder: Path, windows: torch.Tensor, request: Request) -> Quantised:
    """GPTQ by GPTQModel, asymmetric as every other side; otherwise its defaults."""
    # The library sizes a pool of two loaders from this, which defaults to half the processors.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 2) // 2)))
    from gptqmodel import GPTQModel, QuantizeConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = QuantizeConfig(
        bits=request.bits,
        group_size=request.group_size,
        sym=False,
        format="gptq_v2",  # zeros as they are: decoding a layer of the other format before it is saved is off by one
        device=device,
        offload_to_disk=False,
    )
    model = GPTQModel.load(str(folder / "model"), config, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    model.quantize(rows, batch_size=_BATCH)
    found = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "qweight"):
            size = module.qweight.nbytes + module.qzeros.nbytes + module.scales.numel() * HALF_BYTES
            found[name] = (module.dequantize_weight().T, size)
    return found


def _autoround(folder: Path, windows: torch.Tensor, request: Request) -> Quantised:
    """AutoRound (signed gradient descent on the rounding), asymmetric; otherwise its defaults."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder / "model"),
        bits=request.bits,
        group_size=request.group_size,
        sym=False,
        iters=AUTOROUND_STEPS,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=_BATCH,
        dataset=list(windows.split(1)),
        seed=request.seed,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )
    rounded, _ = rounder.quantize()
    found = {}
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module, "scale"):
            size = rounded_bytes(module.weight.numel(), request.bits, request.group_size)
            found[name] = (module.weight, size)
    return found


LIBRARIES: dict[str, Callable[[Path, torch.Tensor, Request], Quantised]] = {"gptq": _gptq, "autoround": _autoround}


def main(folder: Path) -> None:
    """Do what the request says.

    Args:
        folder: see above.
    """
    from safetensors.torch import save_file

    request = Request(**json.loads((folder / "request.json").read_text()))
    torch.manual_seed(request.seed)
    windows = torch.from_numpy(np.load(folder / "windows.npy"))
    found = LIBRARIES[request.library](folder, windows, request)
    weights = {name: weight.detach().to("cpu", torch.float32).contiguous() for name, (weight, _) in found.items()}
    (folder / "sizes.json").write_text(json.dumps({name: size for name, (_, size) in found.items()}))
    save_file(weights, folder / "weights.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
