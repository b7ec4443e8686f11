"""The page at /app, which runs a bundle in the browser, and the files of that bundle."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from mbq_runtime.web import APP_FILE, BUNDLE, SITE, app_document, bundle_files, check_for_browsers

from .errors import ApiError

OPEN_PATHS = frozenset({"/app", *(f"/app/{name}" for name in (APP_FILE, *SITE))})
"""Paths that give no information about the bundle but its depth."""

_TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json", ".json": "application/json", ".txt": "text/plain; charset=utf-8",
}  # fmt: skip
_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


class AppPage:
    """The routes below /app.

    Args:
        folder: of a bundle for WebGPU; None where there is none.

    Raises:
        BundleError: the bundle is broken.
        UsageError: it has no kernels for WebGPU.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            manifest = check_for_browsers(folder)
            self._document = app_document(manifest)
            self._names = dict(bundle_files(folder, manifest))

    async def respond(self, request: Request) -> Response:
        """Answer a request.

        Args:
            request: for a path below /app.
        """
        if self._folder is None:
            why = "there is no bundle for browsers here: start the server with --app FOLDER, exported for webgpu"
            raise ApiError(404, why, code="not_found")
        name = request.path_params.get("name", "")
        if not name:
            # The page names its files relative to its folder.
            if not request.scope.get("raw_path", b"/").partition(b"?")[0].endswith(b"/"):
                return RedirectResponse("app/", 307)
            name = "index.html"
        if name == APP_FILE:
            return Response(self._document, headers=_HEADERS, media_type=_TYPES[".json"])
        if name in SITE:
            content = SITE[name].read_bytes()
            return Response(content, headers=_HEADERS, media_type=_TYPES[Path(name).suffix])
        inner = name.removeprefix(f"{BUNDLE}/")
        if inner != name and inner in self._names:
            return FileResponse(self._folder / inner, headers=_HEADERS, media_type="application/octet-stream")
        raise ApiError(404, f"the page at /app has no file {name[:80]!r}", code="not_found")
