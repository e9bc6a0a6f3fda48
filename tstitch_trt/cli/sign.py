"""``tstitch-trt sign``: a signature beside the manifest of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import option, tstitch_command

__all__ = ["command"]

EXAMPLES = """
tstitch-trt sign fashion.bundle --new-key release.pem
tstitch-trt sign fashion.bundle --key release.pem
tstitch-trt sign fashion.bundle --key release.pem --json
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    key: Path | None = option("Private key: Ed25519 in PEM.", "KEY.pem")
    new_key: Path | None = option("Make the private key first; the public one is KEY.pub.pem beside it.", "KEY.pem")


@tstitch_command("sign", EXAMPLES, wanted=Options)
def command(bundle: Path, wanted: Options, as_json: bool) -> None:
    """Sign BUNDLE: Ed25519 over its manifest, which has the hash of every file. The files are checked first.

    The signature is the file manifest.sig. With --require-signature KEY.pub.pem, other commands refuse a bundle that is
    not signed with that key, or in which a byte was changed. Studies are not signed. A bundle that is built or compiled
    again has to be signed again. Keep the private key secret; if it is encrypted, its passphrase is in
    $TSTITCH_TRT_KEY_PASSPHRASE. Needs the extra "sign" (cryptography).
    """
    from tstitch_engines.bundle.bundle import open_bundle
    from tstitch_engines.bundle.signature import SIGNATURE, new_key, sign_manifest
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.progress import log

    key = wanted.key if wanted.new_key is None else wanted.new_key
    if key is None or (wanted.key is not None and wanted.new_key is not None):
        both = "both" if key is not None else "neither"
        raise BadInput(f"{both} of --key and --new-key are given; allowed is one", hint="e.g. --key release.pem")
    opened = open_bundle(bundle)
    if wanted.new_key is not None:
        log(f"the public key, for --require-signature: {new_key(key)}")
    made = sign_manifest(opened.root, opened.content, key)
    if key.stat().st_mode & 0o077:
        log(f"the private key {key} can be read by others: chmod 600 {key}")
    if as_json:
        from tstitch_trt.cli._documents import SignOutput

        print_json(SignOutput(bundle=str(bundle), signature=str(bundle / SIGNATURE), key=made.fingerprint))
        return
    log(f"signed with {made.fingerprint}")
    click.echo(bundle / SIGNATURE)
