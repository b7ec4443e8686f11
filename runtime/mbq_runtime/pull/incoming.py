"""A bundle that runs while it comes: its lowest depth is there, and the engine's ceiling rises with each next one.

The engine maps the unfinished files.  What has not come is a hole in them.  No token reads slices above the ceiling, so
a hole is not read.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from mbq_runtime.bundle.manifest import Manifest, read
from mbq_runtime.errors import BundleError, MbqError
from mbq_runtime.progress import Progress

from .pull import Pulled, pull
from .sources import Source

MAPPED_ENGINES = ("onnx", "tvm")
"""Engines that map the weights of a native bundle.  The others copy them when they load."""


class Bounded(Protocol):
    """What of an engine this module uses, see ``mbq_runtime.engine.Engine``."""

    path: Path
    ceiling_bits: float | None

    @property
    def has_chat_template(self) -> bool:
        """See ``Engine``.  It loads the tokenizer."""


class Incoming:
    """A bundle that is pulled into the cache folder by a thread.

    source: of the bundle.
    allow_http: whether an http server may be another machine.
    progress: called with (bytes that are right, bytes in all).
    """

    def __init__(self, source: Source, *, allow_http: bool = False, progress: Progress | None = None) -> None:
        self._source, self._allow_http, self._progress = source, allow_http, progress
        self._changed = threading.Condition()
        self._draft: Path | None = None
        self._manifest: Manifest | None = None
        self._given, self._arrived = False, 0
        self._done_bytes = 0
        self._engine: Bounded | None = None
        self.whole: Pulled | None = None
        self.error: MbqError | None = None
        # A daemon: a process that has answered need not wait.  The next one goes on from here.
        self._thread = threading.Thread(target=self._pull, name="mbq-pull", daemon=True)
        self._thread.start()

    @property
    def done_bytes(self) -> int:
        """Bytes that are there and right."""
        return self._done_bytes

    def folder(self, engine: str | None = None) -> Path:
        """Wait until the bundle can run, and return its folder.

        Args:
            engine: kind of engine that will run it; None for the bundle's default.

        Raises:
            MbqError: as ``pull``.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.whole or self.error or self._starts_early(engine))
            if self.error is not None:
                raise self.error
            if self.whole is not None:
                return self.whole.folder
            assert self._draft is not None
            self._given = True
            return self._draft

    def follow(self, engine: Bounded) -> None:
        """Keep an engine below the slices that are not there yet.

        Args:
            engine: that runs the folder.  No reply of it has begun.
        """
        with self._changed:
            if self._given and self._manifest is not None:
                _ = engine.has_chat_template  # an engine may read these files late, and the folder's name will change
                self._engine = engine
                self._raise_ceiling()
                self._changed.notify_all()

    def _raise_ceiling(self) -> None:
        """Let the engine read what is there."""
        if self._engine is not None and self._manifest is not None and len(self._manifest.parts) > 1:
            self._engine.ceiling_bits = float(self._manifest.profile.depth_bits[self._arrived - 1])

    def wait(self) -> None:
        """Wait until all of the bundle is there, or an error ended it."""
        self._thread.join()

    def _starts_early(self, engine: str | None) -> bool:
        return self._draft is not None and self._manifest is not None and runs_in_part(self._manifest, engine)

    def _pull(self) -> None:
        def count(done: int, total: int) -> None:
            self._done_bytes = done
            if self._progress is not None:
                self._progress(done, total)

        def arrived(depth: int, draft: Path) -> None:
            with self._changed:
                if depth == 1:
                    self._draft, self._manifest = draft, read(draft)
                    self._changed.notify_all()
                self._arrived = depth
                self._raise_ceiling()
                if self._manifest is not None and depth == (self._manifest.deepest if self._manifest.parts[1:] else 1):
                    # The folder gets its name next.  An engine that was given the unfinished one must have loaded it.
                    self._changed.wait_for(lambda: not self._given or self._engine is not None)
                    self._draft = None

        try:
            whole = pull(self._source, allow_http=self._allow_http, progress=count, arrived=arrived)
        except MbqError as error:
            self._end(error=error)
        except BaseException as error:
            self._end(error=BundleError(f"{self._source.text}: {type(error).__name__}: {error}"))
            raise
        else:
            self._end(whole=whole)

    def _end(self, *, whole: Pulled | None = None, error: MbqError | None = None) -> None:
        with self._changed:
            self.whole, self.error = whole, error
            if whole is not None and self._engine is not None:
                self._engine.path, self._engine.ceiling_bits = whole.folder, None
            self._changed.notify_all()


def runs_in_part(manifest: Manifest, engine: str | None) -> bool:
    """Whether a bundle can run when only its lowest depth is there.

    Args:
        manifest: of the bundle.
        engine: kind of engine; None for the bundle's default.
    """
    mapped = manifest.native and (engine or manifest.target.engine) in MAPPED_ENGINES
    return mapped and len(manifest.parts) > 1
