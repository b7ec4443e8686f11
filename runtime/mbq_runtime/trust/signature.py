"""Who made a bundle: an Ed25519 signature of its manifest, which has the hash of every file.

``manifest.json.sig`` holds the signature as one line of base64.  Keys are those of OpenSSH (``ssh-keygen -t ed25519``)
or PEM files, so that a maker needs no key of a new kind.  The package ``cryptography`` signs and verifies.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mbq_runtime.bundle.file_names import MANIFEST_NAME, SIGNATURE_NAME
from mbq_runtime.bundle.manifest import MOST_MANIFEST_BYTES
from mbq_runtime.bundle.reading import read_file
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.whole_file import write_whole

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MOST_SIGNATURE_BYTES = 256
_MOST_KEY_BYTES = 1 << 16
_PURPOSE = b"mbq-bundle manifest\n"
"""Signed before the manifest, so that a signature of something else is none of a bundle."""


def sign(folder: Path, key: Path) -> None:
    """Sign a bundle: write ``manifest.json.sig``.

    Args:
        folder: of the bundle, whose manifest is written.
        key: file of a private Ed25519 key.

    Raises:
        UsageError: the key cannot be read.
        BundleError: the manifest cannot be read.
    """
    content = read_file(folder / MANIFEST_NAME, MOST_MANIFEST_BYTES)
    signature = private_key(key).sign(_PURPOSE + content)
    write_whole(folder / SIGNATURE_NAME, base64.b64encode(signature) + b"\n")


def verify(folder: Path, key: Path) -> None:
    """Compare a bundle's signature with a maker's key.  The files are not looked at: ``mbq verify`` does that.

    Args:
        folder: of the bundle.
        key: file of a public Ed25519 key.

    Raises:
        UsageError: the key cannot be read.
        BundleError: the bundle is not signed, or not by this key.
    """
    path = folder / SIGNATURE_NAME
    text = read_file(path, MOST_SIGNATURE_BYTES) if os.path.lexists(path) else None
    check(read_file(folder / MANIFEST_NAME, MOST_MANIFEST_BYTES), text, key, str(folder))


def check(content: bytes, text: bytes | None, key: Path, where: str) -> None:
    """Compare a signature with a maker's key.

    Args:
        content: of the manifest.
        text: of the signature's file; None without one.
        key: file of a public Ed25519 key.
        where: the bundle, for messages.

    Raises:
        UsageError: the key cannot be read.
        BundleError: the bundle is not signed, or not by this key.
    """
    public = public_key(key)
    if text is None:
        raise BundleError(f"{where}: it has no signature ({SIGNATURE_NAME}); ask its maker for a signed bundle")
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(base64.b64decode(text.strip(), validate=True), _PURPOSE + content)
    except (InvalidSignature, binascii.Error):
        raise BundleError(
            f"{where}: {SIGNATURE_NAME} is not of its {MANIFEST_NAME} by the key {key}; do not trust the bundle, or "
            "give the key of its maker"
        ) from None


def private_key(path: Path) -> Ed25519PrivateKey:
    """A key that signs.

    Args:
        path: file of OpenSSH or PEM, without a passphrase.

    Raises:
        UsageError: it is no such key, or ``cryptography`` is missing.
    """
    serialization, ed25519 = _cryptography()
    key = _read(path, (serialization.load_ssh_private_key, serialization.load_pem_private_key), "private", None)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(f"{path}: a {type(key).__name__}, needed a private Ed25519 key (ssh-keygen -t ed25519)")
    return cast("Ed25519PrivateKey", key)


def public_key(path: Path) -> Ed25519PublicKey:
    """A key that verifies.

    Args:
        path: file of OpenSSH (``.pub``) or PEM.

    Raises:
        UsageError: it is no such key, or ``cryptography`` is missing.
    """
    serialization, ed25519 = _cryptography()
    key = _read(path, (serialization.load_ssh_public_key, serialization.load_pem_public_key), "public")
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(f"{path}: a {type(key).__name__}, needed a public Ed25519 key")
    return cast("Ed25519PublicKey", key)


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UsageError("signatures need a package: pip install 'mbq-export[sign]'") from None
    return serialization, ed25519


def _read(path: Path, readers: tuple[Any, ...], kind: str, *more: None) -> object:
    """The key of the first reader that takes the file."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read(_MOST_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: the key cannot be read ({error.strerror}); give the file of a {kind} key") from None
    for reader in readers:
        try:
            return reader(content, *more)
        except TypeError:
            raise UsageError(f"{path}: the key has a passphrase; needed a key without one") from None
        except (ValueError, UnsupportedAlgorithm):
            continue
    raise UsageError(f"{path}: not a {kind} key of OpenSSH or PEM; needed an Ed25519 key (ssh-keygen -t ed25519)")
