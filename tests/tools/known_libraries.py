"""Write the list of operator libraries that ``mbq run`` knows: those of bundles with default options.

    python tests/tools/known_libraries.py [--check]

The build gives the same bytes in each folder and at each time, so anyone can make the list again.  A release needs a
list of its own kernels.  With --check nothing is written, and a list that differs is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from hashlib import sha256
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from mbq_export.methods import AUTO_SLICES
from mbq_runtime.bundle.facts import KV_BITS
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.trust import code
from mbq_targets.build import build_ops_library
from mbq_targets.machines import TARGETS
from mbq_targets.spec import KernelSpec

LIST = Path(code.__file__).with_name(code.KNOWN_LIBRARIES)
GROUP_SIZES = (64, 32)
"""What an export chooses by itself."""
COMPILERS = ("apache-tvm", "ziglang")


def made() -> dict[str, Any]:
    """Build each library, and list its hash."""
    kinds = product(GROUP_SIZES, AUTO_SLICES, KV_BITS)
    specs = [KernelSpec(SliceProfile.parse(slices), size, kv_bits=bits) for size, slices, bits in kinds]
    targets = [target for target in TARGETS.values() if target.native]
    libraries = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        for spec in specs:
            for target in targets:
                build_ops_library(target, spec, path)
                libraries[sha256(path.read_bytes()).hexdigest()] = f"{target.name} {spec}"
                print(f"{len(libraries)} of {len(specs) * len(targets)}", file=sys.stderr)
    return {"compilers": {name: version(name) for name in COMPILERS}, "libraries": libraries}


def main() -> int:
    """Write or check the list.  Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the list, and write nothing")
    check = parser.parse_args().check
    text = json.dumps(made(), indent=2) + "\n"
    if check and text != LIST.read_text(encoding="utf-8"):
        print(f"{LIST}: it is not of these kernels; run {Path(__file__).name} without --check", file=sys.stderr)
        return 1
    if not check:
        LIST.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
