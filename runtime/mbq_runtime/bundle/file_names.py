"""The files of a bundle: their names, and which ones each kind of engine needs."""

from __future__ import annotations

import re

from .layout import NATIVE_LAYOUT, PORTABLE_LAYOUT
from .tensors import WEIGHTS

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.json.sig"
"""The maker's signature of the manifest.  A bundle need not have one."""
TRIM_NAME = "trim.json"
"""The depth that a trimmed bundle was cut behind.  A whole bundle has no such file."""

OPS_LIBRARY = "lib/libmbq_ops.so"
DECODER_LIBRARY = "decoder.so"
GPU_FILES = ("gpu/plan.json", "gpu/weights.bin")
PAPERS = ("README.md", "LICENSE", "NOTICE", ".gitattributes")
"""Files for people, which may be added to a bundle.  No engine reads them."""
DOWNLOAD_RECORDS = re.compile(
    r"\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|(download|upload)/([^/]+/)*[^/]+\.(metadata|lock))"
)
"""What a download with ``hf download --local-dir`` leaves beside the bundle.  Nothing reads it."""
COMMON_FILES = ("genai_config.json", "tokenizer.json")
ENGINE_WEIGHTS = {"onnx": "model.onnx.data", "tvm": WEIGHTS, "opencl": GPU_FILES[1], "webgpu": GPU_FILES[1]}
"""The large file of each engine, which ``parts`` divides by depth."""
WEIGHT_FILES = tuple(dict.fromkeys(ENGINE_WEIGHTS.values()))
ENGINE_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "onnx": {NATIVE_LAYOUT: ("model.onnx", OPS_LIBRARY), PORTABLE_LAYOUT: ("model.onnx",)},
    "tvm": {NATIVE_LAYOUT: (DECODER_LIBRARY, WEIGHTS)},
    "opencl": {NATIVE_LAYOUT: GPU_FILES},
    "webgpu": {NATIVE_LAYOUT: GPU_FILES},
}
"""By engine and layout: the files that the bundle must have."""
