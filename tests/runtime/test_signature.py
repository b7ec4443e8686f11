"""Signatures of bundles, with keys as ssh-keygen and openssl write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from mbq_runtime import BundleError, UsageError
from mbq_runtime.bundle import manifest
from mbq_runtime.bundle.file_names import SIGNATURE_NAME
from mbq_runtime.bundle.listed_files import file_entries
from mbq_runtime.cli import main
from mbq_runtime.trust import signature

OPENSSH = (s.Encoding.PEM, s.PrivateFormat.OpenSSH), (s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
PEM = (s.Encoding.PEM, s.PrivateFormat.PKCS8), (s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)


def write_keys(folder: Path, name: str, forms: tuple[tuple[object, object], tuple[object, object]] = OPENSSH) -> Path:
    """Write a private key, and NAME.pub beside it."""
    key = ed25519.Ed25519PrivateKey.generate()
    (encoding, private), (public_encoding, public) = forms
    content = key.private_bytes(encoding, private, s.NoEncryption())  # type: ignore[arg-type]
    (folder / name).write_bytes(content)
    (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(public_encoding, public))  # type: ignore[arg-type]
    return folder / name


@pytest.mark.parametrize("forms", [OPENSSH, PEM])
def test_sign_and_verify(
    bundle_copy: Path, tmp_path: Path, forms: tuple[tuple[object, object], tuple[object, object]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    key = write_keys(tmp_path, "maker", forms)
    command = ["verify", str(bundle_copy), "--key", f"{key}.pub"]
    assert main(command) == 4
    assert "it has no signature (manifest.json.sig); ask its maker" in capsys.readouterr().err
    signature.sign(bundle_copy, key)
    assert main(command) == 0
    assert f"all as the manifest says; {key}.pub has signed it" in capsys.readouterr().out
    assert main(["verify", str(bundle_copy)]) == 0
    assert file_entries(bundle_copy) == manifest.read(bundle_copy).files


def test_a_change_of_any_file_is_found(bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = write_keys(tmp_path, "maker")
    signature.sign(bundle_copy, key)
    command = ["verify", str(bundle_copy), "--key", f"{key}.pub"]
    template = bundle_copy / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("user", "resu").replace("role", "elor"))
    assert main(command) == 4
    assert "its contents differ" in capsys.readouterr().err
    # The attacker writes a new manifest.
    found = manifest.read(bundle_copy)
    manifest.write(replace(found, files=file_entries(bundle_copy)), bundle_copy)
    assert main(["verify", str(bundle_copy)]) == 0
    assert main(command) == 4
    message = capsys.readouterr().err
    assert "manifest.json.sig is not of its manifest.json by the key" in message
    assert message.count("\n") == 1


def test_another_key(bundle_copy: Path, tmp_path: Path) -> None:
    signature.sign(bundle_copy, write_keys(tmp_path, "maker"))
    with pytest.raises(BundleError, match="do not trust the bundle, or give the key of its maker"):
        signature.verify(bundle_copy, write_keys(tmp_path, "other").with_suffix(".pub"))


@pytest.mark.parametrize("text", ["", "AAAA", "not base64!", "A" * 86 + "==", "A" * 300])
def test_what_is_no_signature(bundle_copy: Path, tmp_path: Path, text: str) -> None:
    key = write_keys(tmp_path, "maker")
    (bundle_copy / SIGNATURE_NAME).write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json\.sig") as caught:
        signature.verify(bundle_copy, key.with_suffix(".pub"))
    assert "\n" not in str(caught.value)


def test_a_signature_of_other_content_is_none_of_a_bundle(bundle_copy: Path, tmp_path: Path) -> None:
    """A maker who signs the bytes of a manifest for another purpose has not signed a bundle."""
    key = write_keys(tmp_path, "maker")
    plain = signature.private_key(key).sign((bundle_copy / "manifest.json").read_bytes())
    (bundle_copy / SIGNATURE_NAME).write_bytes(signature.base64.b64encode(plain))
    with pytest.raises(BundleError, match="do not trust"):
        signature.verify(bundle_copy, key.with_suffix(".pub"))


def test_keys_that_are_refused(tmp_path: Path) -> None:
    key = write_keys(tmp_path, "maker")
    curve = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "curve").write_bytes(curve.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))
    locked = ed25519.Ed25519PrivateKey.generate()
    secret = s.BestAvailableEncryption(b"secret")
    (tmp_path / "locked").write_bytes(locked.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, secret))
    (tmp_path / "text").write_text("key")
    for name, message in (
        ("nowhere", "the key cannot be read"),
        ("text", "not a private key of OpenSSH or PEM"),
        ("maker.pub", "not a private key"),
        ("curve", "needed a private Ed25519 key"),
        ("locked", "the key has a passphrase"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            signature.private_key(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="not a public key"):
        signature.public_key(key)
