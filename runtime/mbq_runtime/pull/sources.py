"""Where a bundle comes from: a web server, the Hugging Face hub, or a folder.

| source | place |
|---|---|
| ``https://HOST/FOLDER`` | a folder on a server of plain files |
| ``hf:OWNER/NAME[@REVISION][/FOLDER]`` | a model of the Hugging Face hub, or a folder in it |
| ``file:FOLDER`` | a folder of this machine, such as a memory stick |
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from mbq_runtime.addresses import may_be_asked
from mbq_runtime.bundle.file_names import MANIFEST_NAME
from mbq_runtime.errors import UsageError

from .files import TOKEN_VARIABLE, Files, FolderFiles

SCHEMES = ("https", "http", "hf", "file")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<folder>[^?#@]+?))?/*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A place that ``mbq pull`` reads.

    text: as the user wrote it, without a slash or ``manifest.json`` at the end; the path of a folder from the root.
    scheme: one of ``SCHEMES``.
    """

    text: str
    scheme: str

    @classmethod
    def of(cls, text: str, *, allow_http: bool = False) -> Source:
        """Read what a user wrote.

        Args:
            text: one of the forms of this module's table.
            allow_http: whether an http server may be another machine.

        Raises:
            UsageError: it has no such form, or its server may not be used.
        """
        scheme = text.partition(":")[0].lower()
        if scheme not in SCHEMES or not is_source(text):
            raise UsageError(f"{text}: needed a source such as https://HOST/FOLDER, hf:OWNER/NAME or file:FOLDER")
        if not _is_whole(text):
            raise UsageError(f"{text}: it has bytes that are no UTF-8; needed a source in UTF-8")
        plain = (text if scheme == "hf" else text.removesuffix(MANIFEST_NAME)).rstrip("/")
        plain += "/" if plain == "file:" and text.startswith("/", len(plain)) else ""
        source = cls(plain, scheme)
        if scheme in ("https", "http"):
            _check_address(plain, allow_http)
        elif scheme == "hf" and not _HUB.fullmatch(plain[3:]):
            raise UsageError(f"{text}: needed hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FOLDER")
        elif scheme == "file":
            host, folder = _parts(plain)
            if host not in ("", "localhost"):
                raise UsageError(f"{text}: a folder of another machine; needed file:FOLDER")
            if not folder.startswith(("/", "~")):  # the same words in another current folder are another source
                return cls(f"file:{quote(os.getcwd())}/{folder}".rstrip("/"), scheme)
        return source

    @property
    def name(self) -> str:
        """Name of the bundle's folder in the cache: the last word of the source, and a hash of all of it."""
        last = re.sub(r"[^A-Za-z0-9._-]+", "-", self.text.rpartition("/")[2].rpartition(":")[2]).strip(".-")
        return f"{last[:60] or 'bundle'}-{sha256(self.text.encode()).hexdigest()[:8]}"

    @contextmanager
    def files(self, *, allow_http: bool = False) -> Iterator[Files]:
        """The bundle's files, while the block runs.

        Args:
            allow_http: whether an http server may be another machine.

        Raises:
            UsageError: a package is missing, or a token would be sent without encryption.
        """
        if self.scheme == "file":
            yield FolderFiles(Path(os.path.expanduser(unquote(_parts(self.text)[1]))))
            return
        from .http import HttpFiles

        if self.scheme == "hf":
            address, headers = _on_hub(self.text)
        else:
            token = os.environ.get(TOKEN_VARIABLE, "")
            address, headers = self.text, _authorization(self.text, TOKEN_VARIABLE, token)
        with HttpFiles(address, headers, allow_http=allow_http) as files:
            yield files


def is_source(text: str) -> bool:
    """Whether a user's text names a source, and not a folder.

    Args:
        text: what stands where a bundle is named.

    >>> is_source("hf:owner/name"), is_source("bundles/smollm2"), is_source("ftp://host/name")
    (True, False, True)
    """
    found = _SCHEME.match(text)
    return found is not None and (found[1].lower() in SCHEMES or text.startswith("//", found.end()))


def _parts(text: str) -> tuple[str, str]:
    """(host, path) of a file source.  Characters that end the path of a URL belong to the name of a folder."""
    path = text.partition(":")[2]
    if not path.startswith("//"):
        return "", path
    host, slash, path = path[2:].partition("/")
    return host, slash + path


def _is_whole(text: str) -> bool:
    """Whether a text has no half characters.  Bytes of a command line that are no UTF-8 become such."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_address(text: str, allow_http: bool) -> None:
    try:
        parts: SplitResult | None = urlsplit(text)
        host = parts.hostname if parts else None
        (host or "").encode("idna")
    except ValueError:  # UnicodeError too: a part of the name is empty or too long
        parts = host = None
    if parts is None or not host:
        raise UsageError(f"{text}: no host; needed an address such as https://HOST/FOLDER")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"{host}: the address has a user name or a password; set {TOKEN_VARIABLE} to a token instead")
    if parts.query or parts.fragment:
        raise UsageError(f"{text}: the address has a ? or a #; needed the address of the bundle's folder")
    if not may_be_asked(text, allow_http):
        raise UsageError(
            f"{text}: http is not encrypted, and others can change what comes; use https, or --allow-http on a "
            "network that you trust"
        )


def _authorization(address: str, variable: str, token: str) -> dict[str, str]:
    """The header with the user's token.  It is never sent without encryption over a network."""
    if not token.strip():
        return {}
    if not may_be_asked(address, allow_http=False):
        raise UsageError(f"{address}: {variable} would be sent without encryption; use https, or unset it")
    if not (token.strip().isascii() and token.strip().isprintable()):
        raise UsageError(f"{variable}: its value has other characters than those of a token; set it again")
    return {"Authorization": f"Bearer {token.strip()}"}


def _on_hub(text: str) -> tuple[str, dict[str, str]]:
    """Address of a bundle on the hub, and headers with the user's token (HF_TOKEN, or that of ``hf auth login``)."""
    try:
        from huggingface_hub import get_token, hf_hub_url
    except ImportError as error:
        raise UsageError(f"{text}: {error.name} is missing: pip install huggingface_hub") from None
    found = _HUB.fullmatch(text[3:])
    assert found is not None  # Source.of has checked it
    folder = f"{found['folder']}/" if found["folder"] else ""
    try:
        address = hf_hub_url(found["repository"], f"{folder}{MANIFEST_NAME}", revision=found["revision"])
    except ValueError as error:
        raise UsageError(f"{text}: no name of the hub ({' '.join(str(error).split())})") from None
    return address.removesuffix(f"/{MANIFEST_NAME}"), _authorization(address, "HF_TOKEN", get_token() or "")
