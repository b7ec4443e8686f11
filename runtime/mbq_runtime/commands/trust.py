"""What is said of a bundle's own code, once for each code, and the option --trust."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from mbq_runtime.cache import cache_dir
from mbq_runtime.printable import printable
from mbq_runtime.trust import code
from mbq_runtime.trust.pulled import pulled_from

F = TypeVar("F", bound=Callable[..., Any])


def trust_option(function: F) -> F:
    """Add the option --trust.

    Args:
        function: a command; it gets ``trust``, a bool.
    """
    help = "Run the machine code of this pulled bundle, now and later.  It can do all that you can."
    return click.option("--trust", is_flag=True, help=help)(function)


def note_code(bundle: Path, *, trust: bool) -> None:
    """Say on stderr that a bundle brings code, the first time that this code is run.

    The cache folder keeps the hashes of what was said.  Without one, it is said each time.  Nothing is said of
    libraries that this release builds, nor of those of a pulled bundle, which need --trust.

    Args:
        bundle: folder of the bundle.
        trust: whether the user trusts the bundle's code.

    Raises:
        BundleError: the bundle is broken, or not for this machine.
    """
    from mbq_runtime.bundle.manifest import read
    from mbq_runtime.engine.load import open_bundle

    found = read(bundle)
    native = code.native_code(found)
    if trust and native:
        open_bundle(bundle, None)  # a bundle that is refused runs nothing
        code.trust(found)
    if pulled_from(bundle) is not None:
        native = []
    files = [entry for entry in [*native, *code.gpu_code(found)] if not code.is_known(entry.sha256)]
    if not files:
        return
    key = hashlib.sha256("".join(sorted(entry.sha256 for entry in files)).encode()).hexdigest()
    mark = cache_dir() / "noted-code" / key
    if mark.exists():
        return
    open_bundle(bundle, None)
    text = f"{bundle}: runs {code.description(found)}; run it only if you trust its maker (docs/security.md)"
    click.echo(f"note: {printable(text)}", err=True)
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
