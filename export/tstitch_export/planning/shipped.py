"""Members exported beforehand: a record beside graph and weights, so that a build needs neither torch nor onnx."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import Member
from tstitch_engines.bundle.read import MANIFEST_BYTES, read_json
from tstitch_engines.errors import BadBundle

__all__ = ["ShippedMember", "read_shipped", "write_shipped"]


class ShippedMember(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``member.onnx`` names files beside the record; ``versions`` are those of the libraries that exported them."""

    member: Member
    versions: dict[str, str]


def read_shipped(path: Path) -> ShippedMember:
    """The record at ``path``, its files verified. Raises ``BadBundle`` for a damaged installation."""
    fix = "install the package again: pip install --force-reinstall tstitch-trt"
    try:
        record = convert(read_json(path, MANIFEST_BYTES), ShippedMember, word="field")
        for part in record.member.onnx:
            if hash_file(path.parent / part.path) != (part.sha256, part.bytes):
                raise BadBundle(f"{path.parent / part.path} was altered since it was packed", hint=fix)
    except (DecodeError, OSError, ValueError) as error:
        raise BadBundle(f"the shipped member {path.name} is damaged: {error}", hint=fix) from None
    return record


def write_shipped(path: Path, record: ShippedMember) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
