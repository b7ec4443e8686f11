"""How long a prompt takes by the tokens of one pass (``search.chunk_size`` of genai_config.json).

    python tests/benchmarks/prompt_chunk.py [--vocab 262144] [--prompt 512] [--rounds 5] [--bundle FOLDER]

The command exports a random model of the given vocabulary, rounded plainly, for this machine.  ``--bundle`` keeps it,
or uses one that is there; its genai_config.json is changed.  The chunks take turns in each round.  The first line is
the machine; then a line for each chunk: median and quartiles of the seconds, and the tokens per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))

from measured_on import measured_on

from mbq_runtime import Engine
from mbq_runtime.bundle import manifest
from mbq_runtime.bundle.file_names import MANIFEST_NAME
from mbq_runtime.bundle.genai_config import PROMPT_CHUNK
from mbq_runtime.bundle.listed_files import file_entries

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip
OLD_BOUND_BYTES = 32 << 20
"""Before 2026-12 the float32 logits of all tokens of a chunk stayed below this, from 16 to 512 tokens."""


def old_chunk(vocab: int) -> int:
    """Tokens of a pass as they were chosen before.

    Args:
        vocab: size of the vocabulary.
    """
    tokens = OLD_BOUND_BYTES // (4 * vocab)
    return max(16, min(512, 1 << max(tokens, 1).bit_length() - 1))


def export(folder: Path, vocab: int) -> Path:
    """Make a bundle of a random model.

    Args:
        folder: where the checkpoint and the bundle are written.
        vocab: size of the vocabulary.
    """
    from tiny_models import write_checkpoint  # type: ignore[import-not-found]

    checkpoint = write_checkpoint(folder / "model", "llama", vocab_size=vocab, **SHAPE)
    text = folder / "text.txt"
    text.write_text("The tide turns twice a day, and twice a day the boats leave the harbour. " * 400)
    command = [sys.executable, "-m", "mbq_export.cli", "--model", str(checkpoint), "--output", str(folder / "bundle")]
    command += ["--target", "host", "--method", "rtn", "--router", "norm", "--calib-data", str(text)]
    subprocess.run([*command, "--calib-tokens", "2048"], check=True)
    return folder / "bundle"


def load(bundle: Path, chunk: int, threads: int | None) -> Engine:
    """Load the bundle after its chunk was set.

    Args:
        bundle: folder of the bundle.
        chunk: prompt tokens of a pass.
        threads: processor threads; None: one per core.
    """
    file = bundle / "genai_config.json"
    config = json.loads(file.read_bytes())
    config["search"]["chunk_size"] = chunk
    file.write_text(json.dumps(config))
    facts = manifest.read(bundle)
    manifest.write(replace(facts, files=file_entries(bundle)), bundle)
    return Engine.load(bundle, threads=threads)


def measure(bundle: Path, chunks: list[int], options: argparse.Namespace) -> None:
    """Time prompts with each chunk, and print the figures.

    Args:
        bundle: folder of the bundle.
        chunks: prompt tokens of a pass, to be compared.
        options: of the command.
    """
    engines = {chunk: load(bundle, chunk, options.threads) for chunk in chunks}
    seconds: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for round_ in range(options.rounds + 1):
        for chunk, engine in engines.items():
            taken = sum(engine.time_passes([options.prompt], engine.manifest.budget.default_bits).seconds)
            if round_:  # the first warms up
                seconds[chunk].append(taken)
    print(json.dumps(measured_on()))
    print(f"{options.prompt} tokens, vocabulary {engine.manifest.model.vocab_size}, {engine.threads} threads")
    for chunk, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        print(f"chunk {chunk:4}  {middle:7.3f} s ({low:.3f} to {high:.3f})  {options.prompt / middle:8.1f} tokens/s")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--chunks", help="Such as 32,128.  [default: the old one and the one of today]")
    parser.add_argument("--bundle", type=Path, help="Keep the model and its bundle here.")
    options = parser.parse_args()
    chunks = [int(part) for part in options.chunks.split(",")] if options.chunks else []
    with TemporaryDirectory() as name:
        folder = options.bundle or Path(name)
        made = folder / "bundle"
        if not (made / MANIFEST_NAME).is_file():
            made = export(folder, options.vocab)
        measure(made, chunks or sorted({old_chunk(options.vocab), PROMPT_CHUNK}), options)


if __name__ == "__main__":
    main()
