"""SHA-256 of every file of a tiny bundle of every family, engine, layout and method.

Run it before a change that must not change bundles, and again after it, on one machine:

    python tests/tools/bundle_hashes.py write hashes.json
    python tests/tools/bundle_hashes.py check hashes.json

``check`` names each file that differs and exits with 1.  Calibration uses the processor's own products, so two
machines have two lists.  TVM does not fix the order of some instructions: of ``decoder.so`` only the size is compared.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))

from exporting import digests, run
from tiny_models import EXPERTS, MODELS, write_checkpoint

RECIPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rtn": (("portable", "webgpu"), ("--method", "rtn")),
    "rtn-both": (("host", "arm64"), ("--method", "rtn", "--engine", "both")),
    "nested": (("portable",), ("--method", "nested", "--tune-steps", "4")),
    "learned": (("portable",), ("--method", "learned", "--tune-steps", "4")),
    "learned-2222": (("portable",), ("--method", "learned", "--tune-steps", "4", "--slices", "2,2,2,2")),
}
"""By name: targets and options.  Those of ``TUNED`` tune, which is slow, on few models."""
TUNED = ("nested", "learned", "learned-2222")
TUNED_MODELS = ("llama", "gemma3_text")
NO_GPU = ("lfm2", "lfm3", "qwen3_5_text", "gemma4_text", "gemma4_text-large", *EXPERTS)
TEXT = "The tide turns twice a day, and twice a day the boats leave the harbour. " * 400


DECODER = "decoder.so"


def comparable(output: Path) -> dict[str, str]:
    """SHA-256 of each file below ``output``, by path; of ``decoder.so`` the size.

    Manifests are hashed without the hash of ``decoder.so``.
    """
    found = digests(output)
    for path in found:
        file = output / path
        if file.name == DECODER:
            found[path] = f"{file.stat().st_size} bytes"
        elif file.name == "manifest.json":
            manifest = json.loads(file.read_text(encoding="utf-8"))
            for entry in manifest["files"]:
                if entry["name"] == DECODER:
                    del entry["sha256"]
            found[path] = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return found


def bundle_hashes() -> dict[str, str]:
    """``comparable`` by ``recipe/model/path``."""
    found: dict[str, str] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")
        for model in MODELS:
            checkpoint = write_checkpoint(folder / model, model)
            for recipe, (targets, options) in RECIPES.items():
                if recipe in TUNED and model not in TUNED_MODELS:
                    continue
                output = folder / recipe / model
                command = [sys.executable, "-m", "mbq_export.cli", "--model", str(checkpoint), "--output", str(output)]
                targets = tuple(target for target in targets if target != "webgpu" or model not in NO_GPU)
                command += ["--calib-data", str(folder / "text.txt"), "--calib-tokens", "2048", *options]
                if model in EXPERTS:
                    command = ["onnx" if part == "both" else part for part in command]
                run([*command, *(part for target in targets for part in ("--target", target))])
                found |= {f"{recipe}/{model}/{path}": digest for path, digest in comparable(output).items()}
                print(f"{recipe} {model}", file=sys.stderr)
    return found


def main(action: str, path: str) -> int:
    found = bundle_hashes()
    if action == "write":
        Path(path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    wanted = json.loads(Path(path).read_text(encoding="utf-8"))
    differing = sorted(file for file in wanted.keys() | found.keys() if wanted.get(file) != found.get(file))
    for file in differing:
        print(f"differs: {file}")
    print(f"{len(found)} files, {len(differing)} of them differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
