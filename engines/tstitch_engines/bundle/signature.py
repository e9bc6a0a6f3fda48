"""Signatures of bundles: Ed25519 (RFC 8032) over the manifest's exact bytes, which have every file's sha256.

Studies are in no manifest and so are not signed. The signature lies beside the manifest; whoever rebuilds a bundle
replaces both, so the new one is unsigned.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any, Final

import msgspec

from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.files import replace_file
from tstitch_engines.bundle.read import read_bounded, read_json
from tstitch_engines.errors import BadBundle, BadInput, Untrusted
from tstitch_engines.needs import require

__all__ = ["SIGNATURE", "Signature", "check_signature", "is_valid", "new_key", "read_signature", "sign_manifest"]

SIGNATURE: Final = "manifest.sig"
_PASSPHRASE: Final = "TSTITCH_TRT_KEY_PASSPHRASE"  # noqa: S105 - the name of a variable
_KEY_BYTES: Final = 64 << 10
_NEW_KEY: Final = "make one: tstitch-trt sign BUNDLE --new-key KEY.pem"


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``key``: the public key, 32 bytes, and ``value``, 64 bytes, in base64."""

    algorithm: str
    key: str
    value: str = msgspec.field(name="signature")

    @property
    def fingerprint(self) -> str:
        """Of the key that it claims to be made with."""
        return _fingerprint(_decoded(self.key, 32))


def read_signature(root: Path) -> Signature | None:
    """The signature of the bundle at ``root``, not checked; ``None`` where it has none. Raises ``BadBundle``."""
    file = root / SIGNATURE
    try:
        found = convert(read_json(file, _KEY_BYTES), Signature, word="field")
        if found.algorithm != "ed25519":
            raise DecodeError(f"it is of {found.algorithm[:40]!r}; known is 'ed25519'", "")
        _decoded(found.key, 32)
        _decoded(found.value, 64)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadBundle(
            f"{file} is damaged: {error}", hint="sign the bundle again: tstitch-trt sign BUNDLE --key KEY.pem"
        ) from None
    return found


def check_signature(root: Path, manifest: bytes, public_key: Path) -> None:
    """Raises ``Untrusted`` unless these bytes of the manifest at ``root`` are signed with the key in ``public_key``.

    Raises ``BadInput`` for a file without such a key, ``Unavailable`` without the library.
    """
    key = _public_key(public_key)
    wanted = _fingerprint(_raw(key))
    found = read_signature(root)
    if found is None:
        raise Untrusted(
            f"{root} has no signature; wanted is one of {wanted} ({public_key})",
            hint="get the signed bundle (engines that are compiled again leave it unsigned), or sign it: "
            "tstitch-trt sign BUNDLE --key KEY.pem",
        )
    if found.fingerprint != wanted:
        raise Untrusted(
            f"{root} is signed with another key, {found.fingerprint}; wanted is {wanted} ({public_key})",
            hint="do not trust this bundle, or give the public key of who signed it",
        )
    if not _valid(key, found, manifest):
        raise Untrusted(
            f"the manifest of {root} is not what {wanted} signed: it was altered, or signed before it was built again",
            hint="do not trust this bundle; get it again from its source",
        )


def is_valid(signature: Signature, manifest: bytes) -> bool:
    """Whether it is of these bytes and of the key that it names itself. Raises ``Unavailable`` without the library."""
    ed25519 = _library("asymmetric.ed25519")
    return _valid(ed25519.Ed25519PublicKey.from_public_bytes(_decoded(signature.key, 32)), signature, manifest)


def sign_manifest(root: Path, manifest: bytes, private_key: Path) -> Signature:
    """Writes the signature of these bytes of the manifest at ``root``. Raises ``BadInput`` for a file without a key."""
    key = _private_key(private_key)
    signature = Signature(
        algorithm="ed25519",
        key=base64.b64encode(_raw(key.public_key())).decode(),
        value=base64.b64encode(key.sign(manifest)).decode(),
    )
    try:
        replace_file(root / SIGNATURE, msgspec.json.format(msgspec.json.encode(signature), indent=2) + b"\n")
    except OSError as error:
        raise BadBundle(f"{root / SIGNATURE} can't be written: {error.strerror}", hint="sign a copy of it") from None
    return signature


def new_key(path: Path) -> Path:
    """Writes a new private key to ``path`` (PEM, for its owner alone) and returns the public key's file beside it.

    Encrypted where ``$TSTITCH_TRT_KEY_PASSPHRASE`` is set. Raises ``BadInput`` where one of the files exists.
    """
    serialization, ed25519 = _library("serialization"), _library("asymmetric.ed25519")
    key = ed25519.Ed25519PrivateKey.generate()
    phrase = os.environb.get(_PASSPHRASE.encode())
    hidden = serialization.BestAvailableEncryption(phrase) if phrase else serialization.NoEncryption()
    pem, public = serialization.Encoding.PEM, path.with_name(f"{path.stem}.pub.pem")
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, hidden)
    shown = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    for file, content, mode in ((path, private, 0o600), (public, shown, 0o644)):
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise BadInput(f"{file} can't be made: {error.strerror}", hint="give a new file: --new-key FILE") from None
        with os.fdopen(handle, "wb") as out:
            out.write(content)
    return public


def _library(module: str) -> Any:
    return require(f"cryptography.hazmat.primitives.{module}", "signing", extra="sign")


def _private_key(path: Path) -> Any:
    content = _key_file(path)
    phrase = os.environb.get(_PASSPHRASE.encode())
    if b"ENCRYPTED" in content and not phrase:
        raise BadInput(f"{path} is encrypted", hint=f"put its passphrase into the environment: {_PASSPHRASE}")
    load = _library("serialization").load_pem_private_key
    try:
        key = load(content, phrase if b"ENCRYPTED" in content else None)
    except Exception as error:  # the library's own classes besides ValueError and TypeError
        public = b"PUBLIC KEY" in content
        problem = "it is a public key" if public else f"or its passphrase is another one ({type(error).__name__})"
        raise BadInput(f"{path} is no private key in PEM: {problem}", hint=_NEW_KEY) from None
    if not isinstance(key, _library("asymmetric.ed25519").Ed25519PrivateKey):
        raise BadInput(f"{path} is a {type(key).__name__}; allowed is Ed25519", hint=_NEW_KEY)
    return key


def _public_key(path: Path) -> Any:
    content = _key_file(path)
    if b"PRIVATE KEY" in content:
        raise BadInput(
            f"{path} is a private key; wanted is the public one, which may be given to anybody",
            hint=f"give {path.stem}.pub.pem, and keep the private one where bundles are signed",
        )
    load = _library("serialization").load_pem_public_key
    try:
        key = load(content)
    except Exception as error:  # the library's own classes besides ValueError
        raise BadInput(f"{path} is no public key in PEM ({type(error).__name__})", hint=_NEW_KEY) from None
    if not isinstance(key, _library("asymmetric.ed25519").Ed25519PublicKey):
        raise BadInput(f"{path} is a {type(key).__name__}; allowed is Ed25519", hint=_NEW_KEY)
    return key


def _key_file(path: Path) -> bytes:
    try:
        return read_bounded(path, _KEY_BYTES)
    except (OSError, DecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadInput(f"the key {path} can't be read: {reason}", hint=f"give a file in PEM, or {_NEW_KEY}") from None


def _valid(key: Any, signature: Signature, manifest: bytes) -> bool:
    invalid = require("cryptography.exceptions", "signing", extra="sign").InvalidSignature
    try:
        key.verify(_decoded(signature.value, 64), manifest)
    except invalid:
        return False
    return True


def _raw(public_key: Any) -> bytes:
    raw: bytes = public_key.public_bytes_raw()
    return raw


def _fingerprint(raw: bytes) -> str:
    return "SHA256:" + base64.b64encode(hashlib.sha256(raw).digest()).decode().rstrip("=")


def _decoded(text: str, size: int) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise DecodeError(f"it has text that is no base64: {error}", "") from None
    if len(raw) != size:
        raise DecodeError(f"it has {len(raw)} bytes where {size} belong", "")
    return raw
