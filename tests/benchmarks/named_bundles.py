"""Bundles by name: those of the shapes of ``versus_models.py``, made once in its work folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

SLICES = "3,1,2,2"


def bundle_of(text: str, kv_bits: int | Literal["auto"] = "auto") -> Path:
    """The folder of a bundle.

    text: a folder, or a name such as llama-1b, of which a bundle of rounded weights is made (12 GB of disk and memory);
    kv_bits: of that bundle, as ``mbq-export --kv``.
    """
    if Path(text).exists():
        return Path(text)
    # What makes bundles is loaded for a name.
    from versus_models import CHECKPOINTS, default_work_folder, own_bundle

    from mbq_targets.machines import resolve

    if text not in CHECKPOINTS:
        raise SystemExit(f"{text}: no such folder, and no shape; known shapes: {', '.join(CHECKPOINTS)}")
    return own_bundle(default_work_folder(), text, SLICES, 16, resolve("host"), kv_bits)


def gguf_of(text: str, quantisation: str) -> Path | None:
    """The file of llama.cpp with the same weights; None where a folder was given, or llama.cpp is not installed.

    text: as for ``bundle_of``; quantisation: a type of GGUF, such as Q4_0.
    """
    if Path(text).exists():
        return None
    from versus_models import default_work_folder, gguf, has_llama_cpp

    return gguf(default_work_folder(), text, quantisation) if has_llama_cpp() else None
