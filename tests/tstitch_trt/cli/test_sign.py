"""Signed bundles: what ``sign`` writes, and what ``--require-signature`` refuses."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tstitch_trt
from support.command import Command, refused
from support.tiny import TinyPair
from support.torch_engines import PROGRAM, with_torch_engines
from tstitch_engines.bundle.built_here import is_built_here
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.manifest import Component
from tstitch_engines.compile.bundle import recompile
from tstitch_engines.errors import Unavailable, Untrusted
from tstitch_engines.spec import Range

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def bundle(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    shutil.copytree(tiny_pair.bundle, tmp_path / "a.bundle")
    return tmp_path / "a.bundle"


@pytest.fixture
def keys(run: Command, bundle: Path) -> tuple[Path, Path]:
    """Private and public key with which ``bundle`` is signed."""
    private = bundle.parent / "key.pem"
    outcome = run("sign", bundle, "--new-key", private, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["key"].startswith("SHA256:")
    assert "key.pub.pem" in outcome.err
    return private, private.with_name("key.pub.pem")


def other_key(run: Command, bundle: Path) -> Path:
    copy = bundle.with_name("other.bundle")
    shutil.copytree(bundle, copy)
    assert run("sign", copy, "--new-key", bundle.with_name("other.pem")).code == 0
    return bundle.with_name("other.pub.pem")


def test_a_signed_bundle(run: Command, bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    for command in (
        ("report", bundle, "--no-samples", "-o", tmp_path / "a.html"),
        ("inspect", bundle),
    ):
        outcome = run(*command, "--require-signature", public)
        assert outcome.code == 0, outcome.err
    assert "SHA256:" in run("inspect", bundle, "--json").json["signed"]
    again = run("sign", bundle, "--key", private)
    assert again.out.strip() == str(bundle / "manifest.sig")
    tstitch_trt.load(bundle, require_signature=public).close()


def edit(bundle: Path) -> None:
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tiny"', '"mine"', 1))


def space(bundle: Path) -> None:
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")


def flip(bundle: Path) -> None:
    part = open_bundle(bundle).manifest.members["large"].engines[0].files[0]
    content = bytearray((bundle / part.path).read_bytes())
    content[-1] ^= 1
    (bundle / part.path).write_bytes(content)


def signature(text: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / "manifest.sig").write_text(text) and None


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (lambda bundle: (bundle / "manifest.sig").unlink(), "has no signature"),
        (edit, "is not what SHA256:"),
        (space, "is not what SHA256:"),
        (flip, "is altered: its sha256 is"),
        (signature("nothing"), "is damaged"),
        (signature('{"algorithm": "ed25519", "key": "AA==", "signature": "AA=="}'), "bytes where 32 belong"),
        (signature('{"algorithm": "none", "key": "", "signature": ""}'), "known is 'ed25519'"),
        (signature('{"algorithm": "ed25519"}'), "missing required field"),
    ],
)
def test_what_is_refused(
    run: Command, bundle: Path, keys: tuple[Path, Path], attack: Callable[[Path], None], words: str
) -> None:
    attack(bundle)
    for command in ("inspect", "sample", "verify", "bench", *(["build"] if attack is not flip else [])):
        refused(run(command, bundle, "--require-signature", keys[1]), words)


def test_another_key(run: Command, bundle: Path, keys: tuple[Path, Path]) -> None:
    refused(run("inspect", bundle, "--require-signature", other_key(run, bundle)), "signed with another key, SHA256:")
    # its own signature of an altered manifest is valid and says whose it is
    edit(bundle)
    assert "NOT VALID" in run("inspect", bundle).out
    assert run("sign", bundle, "--key", bundle.with_name("other.pem")).code == 0
    assert "NOT VALID" not in run("inspect", bundle).out
    refused(run("sample", bundle, "--require-signature", keys[1]), "signed with another key")


def test_hashes_are_what_is_signed(bundle: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(tstitch_trt.BadInput, match="verify = 'size'"):
        tstitch_trt.load(bundle, verify="size", require_signature=keys[1])
    with pytest.raises(tstitch_trt.BadInput, match="of an opened bundle"):
        tstitch_trt.load(open_bundle(bundle), require_signature=keys[1])
    tstitch_trt.load(open_bundle(bundle, require_signature=keys[1]), require_signature=keys[1]).close()


def test_engines_compiled_again_leave_it_unsigned(
    run: Command, bundle: Path, keys: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_bundle(bundle, require_signature=keys[1])
    made = recompile(opened, backend="onnxruntime", profile={"B": Range(1, 2, 3)})
    assert "was signed" in caplog.text
    assert made.vouched
    assert all(is_built_here(member.engines[0].files) for member in made.manifest.members.values())
    assert not (bundle / "manifest.sig").exists()
    refused(run("sample", bundle, "--require-signature", keys[1], "--rebuild"), "has no signature", "sign it")


def test_a_signature_vouches_for_engines_that_may_run_code(run: Command, tiny_pair: TinyPair, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    bundle = tmp_path / "torch.bundle"
    with_torch_engines(tiny_pair.bundle, bundle)
    assert run("sign", bundle, "--new-key", tmp_path / "key.pem").code == 0
    with pytest.raises(Untrusted, match="may run code"):
        tstitch_trt.load(bundle)
    public = tmp_path / "key.pub.pem"
    tstitch_trt.load(bundle, threads=1, require_signature=public).close()
    program = bundle / "small" / PROGRAM
    program.write_bytes(program.read_bytes()[:-1] + b"\1")
    for rebuild in (False, True):
        with pytest.raises(tstitch_trt.BadInput, match=r"is altered|not compiled from ONNX"):
            tstitch_trt.load(bundle, threads=1, require_signature=public, rebuild=rebuild)


# --- key files


def rsa(path: Path) -> Path:
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(pem, kind))
    return path


def test_key_files(run: Command, bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    other = rsa(tmp_path / "ec.pem")
    (tmp_path / "large.pem").write_bytes(bytes(1 << 20))
    refused(run("sign", bundle, "--key", public), "it is a public key")
    refused(run("sign", bundle, "--key", other), "allowed is Ed25519")
    refused(run("sign", bundle, "--key", bundle / "manifest.json"), "no private key in PEM")
    refused(run("sign", bundle, "--key", tmp_path / "large.pem"), "can't be read")
    refused(run("sign", bundle, "--key", tmp_path / "nothing.pem"), "can't be read", "--new-key")
    refused(run("sign", bundle, "--new-key", private), "can't be made: File exists")
    refused(run("sign", bundle), "neither of --key and --new-key")
    refused(run("sign", bundle, "--key", private, "--new-key", tmp_path / "n.pem"), "both of --key and --new-key")
    for key, words in ((private, "is a private key"), (other.with_suffix(".pub"), "allowed is Ed25519"),
                       (bundle / "manifest.json", "no public key in PEM"), (tmp_path, "can't be read")):  # fmt: skip
        refused(run("sample", bundle, "--require-signature", key), words)
    refused(run("build", "fashion", "--require-signature", public), "is a recipe")
    private.chmod(0o644)
    assert "can be read by others" in run("sign", bundle, "--key", private).err


def test_a_passphrase(run: Command, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "secret.pem"
    monkeypatch.setenv("TSTITCH_TRT_KEY_PASSPHRASE", "open sesame")
    assert run("sign", bundle, "--new-key", key).code == 0
    assert b"ENCRYPTED" in key.read_bytes()
    assert run("sign", bundle, "--key", key).code == 0
    monkeypatch.setenv("TSTITCH_TRT_KEY_PASSPHRASE", "another")
    refused(run("sign", bundle, "--key", key), "passphrase is another")
    monkeypatch.delenv("TSTITCH_TRT_KEY_PASSPHRASE")
    refused(run("sign", bundle, "--key", key), "is encrypted", "TSTITCH_TRT_KEY_PASSPHRASE")


def test_without_the_library(bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(Unavailable) as caught:
        open_bundle(bundle, require_signature=keys[1])
    assert "tstitch-trt[sign]" in caught.value.hint


def test_a_damaged_bundle_is_not_signed(run: Command, bundle: Path, tmp_path: Path) -> None:
    flip(bundle)
    refused(run("sign", bundle, "--new-key", tmp_path / "key.pem"), "is altered")
    assert not (tmp_path / "key.pem").exists()


def test_the_bytes_that_were_checked_are_decoded(bundle: Path, keys: tuple[Path, Path]) -> None:
    opened = open_bundle(bundle, require_signature=keys[1])
    edit(bundle)
    assert json.loads(opened.content)["name"] == opened.manifest.name == "tiny"
    assert all(isinstance(part, Component) for part in opened.manifest.components())
