"""llama.cpp's own converter from Hugging Face folders to GGUF, out of the source package of llama-cpp-python.

The package is downloaded once and kept beside the finished exports.  The converter knows published tokenizers by the
hash of what they do; the tests' tokenizers are none of those, so the name of their pre-tokenizer is given to it.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import tarfile
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import finished_exports
import needs
from forked_mbq import Mbq, forks

PACKAGE = "llama-cpp-python"
_PARTS = ("conversion/", "gguf-py/gguf/", "convert_hf_to_gguf.py")
_LIBRARIES = ("torch", "sentencepiece", "transformers.models.auto.modeling_auto",
              "transformers.models.auto.tokenization_auto")  # fmt: skip
_SCRIPT = """
import sys
pre, root = sys.argv[1:3]
sys.path[:0] = [root + "/gguf-py", root]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def convert(folder: Path, output: Path, *more: str, pre: str = "gpt-2") -> Path:
    """Write a GGUF file of 32-bit floats.

    Args:
        folder: a Hugging Face model folder.
        output: the file to write.
        more: further arguments of the converter.
        pre: value of ``tokenizer.ggml.pre``.

    Returns:
        ``output``.
    """
    arguments = [pre, _converter(), folder, "--outtype", "f32", "--outfile", output, *more]
    done = _python()(arguments, program=_SCRIPT, imports=_LIBRARIES)
    assert done.code == 0, done.err[-2000:]
    return output


@cache
def _python() -> Mbq:
    """Runs programs in forks of one process: to load the converter's libraries takes longer than to convert."""
    process = ExitStack()
    atexit.register(process.close)
    return process.enter_context(forks(Path(tempfile.gettempdir()), most_s=600))


def _version() -> str:
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith("llama_cpp_python=="))


@cache
def _converter() -> Path:
    """The folder with the converter, downloaded where it is not there yet."""
    kept = finished_exports.root() or Path(tempfile.gettempdir())
    folder = kept / f"llama.cpp-{_version()}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as draft_name:
        draft = Path(draft_name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        done = subprocess.run(
            [*command, "--dest", str(draft), f"{PACKAGE}=={_version()}"], capture_output=True, text=True, check=False
        )
        found = list(draft.glob("*.tar.gz"))
        if done.returncode != 0 or not found:
            needs.missing(f"no source package of {PACKAGE}: {done.stderr.strip().splitlines()[-1:]}")
        kept.mkdir(parents=True, exist_ok=True)
        unpacked = Path(tempfile.mkdtemp(dir=kept))
        with tarfile.open(found[0]) as archive:
            for member in archive.getmembers():
                _, _, path = member.name.partition("/vendor/llama.cpp/")
                if path.startswith(_PARTS) and member.isfile():
                    member.name = path
                    archive.extract(member, unpacked, filter="data")
    try:
        unpacked.rename(folder)
    except OSError:
        assert folder.is_dir()  # another run was faster
    return folder
