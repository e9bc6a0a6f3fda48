"""The identity of an engine: what it was compiled from and for, as one digest, and the reason for a mismatch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from tstitch_engines.bundle.manifest import Component, EngineIdentity
from tstitch_engines.errors import BadEngine

__all__ = ["canonical", "check_identity", "differences", "digest", "model_digest"]


def canonical(record: Any) -> bytes:
    """One JSON text per value: sorted keys, no spaces, ASCII. Equal records give equal bytes on every machine."""
    plain = msgspec.to_builtins(record)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(record: Any) -> str:
    """The sha256 of the canonical form, in hex: the cache key of what the record describes."""
    return hashlib.sha256(canonical(record)).hexdigest()


def model_digest(files: Sequence[Component]) -> str:
    """The hash of a model that may be spread over several files.

    A single file's digest is its own sha256. With external data it covers each file's name and content: the graph
    refers to its data by name, so a renamed data file is another model.
    """
    if len(files) == 1:
        return files[0].sha256
    return digest(sorted((part.path.rpartition("/")[2], part.sha256) for part in files))


def differences(stored: EngineIdentity, here: EngineIdentity) -> list[tuple[str, str, str]]:
    """The fields that differ, with both values; nested ones have dotted names (``profile.B``, ``options.level``)."""
    before, now = _flat(stored), _flat(here)
    absent = "nothing"
    return [
        (name, before.get(name, absent), now.get(name, absent))
        for name in [*before, *(name for name in now if name not in before)]
        if before.get(name, absent) != now.get(name, absent)
    ]


def check_identity(stored: EngineIdentity, here: EngineIdentity, *, what: str, rebuild: str) -> None:
    """Raises ``BadEngine`` naming every differing field unless both identities are the same.

    ``what`` names the engine (``"engine of member 'small'"``), ``rebuild`` is the command that makes a fitting one.
    """
    found = differences(stored, here)
    if not found:
        return
    lines = "; ".join(f"{field} is {was} in the bundle and {now} here" for field, was, now in found)
    raise BadEngine(f"{what} was not compiled for this machine and version: {lines}", hint=f"build it again: {rebuild}")


def _flat(identity: EngineIdentity) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name in identity.__struct_fields__:
        value = getattr(identity, name)
        if name == "profile":
            flat.update({f"profile.{dim}": str(size) for dim, size in value.dims.items()})
        elif name == "options":
            flat.update({f"options.{key}": repr(option) for key, option in sorted(value.items())})
        elif value is not msgspec.UNSET:
            flat[name] = str(value)
    return flat
