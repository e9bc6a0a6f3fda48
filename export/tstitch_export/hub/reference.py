"""What may stand where a checkpoint's path does: ``ORG/NAME``, ``ORG/NAME/PATH``, each with ``@REVISION``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from tstitch_engines.errors import BadInput
from tstitch_export.checkpoint.checkpoint import PICKLED, SAFETENSORS

__all__ = ["Reference", "is_commit", "read_reference"]

_PART: Final = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)  # of a repository's name
_REVISION: Final = re.compile(r"\w[\w./+-]{0,199}", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_FILES: Final = (*SAFETENSORS, *PICKLED, ".gguf", ".json", ".onnx", ".toml", ".yaml")


@dataclass(frozen=True)
class Reference:
    """A file or folder (``path``, empty for all) of the ``repository`` at a branch, tag or commit (``revision``)."""

    repository: str
    path: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repository}{self.path and '/'}{self.path}@{self.revision}"


def is_commit(revision: str) -> bool:
    """Whether it is a whole commit hash, which always means the same files."""
    return _COMMIT.fullmatch(revision) is not None


def read_reference(text: str) -> Reference | None:
    """The repository that ``text`` names; ``None`` where it can only be a path.

    Paths are ``/...``, ``./...``, ``../...``, ``~...``, a single name, and ``FOLDER/FILE`` with the ending of a
    checkpoint. Raises ``BadInput`` for a revision that git does not allow.
    """
    name, at, revision = text.partition("@")
    owner, *rest = name.rstrip("/").split("/")
    if not rest or not all(rest) or {".", ".."} & set(rest):
        return None
    if any(not _PART.fullmatch(part) or ".." in part or "--" in part for part in (owner, rest[0])):
        return None
    if len(rest) == 1 and rest[0].lower().endswith((*_FILES, ".git")):
        return None
    if not all(map(str.isprintable, rest)) or "\\" in name:
        return None
    if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision.endswith("/")):
        raise BadInput(
            f"{text!r} has the revision {revision[:80]!r}; allowed is the name of a branch or tag, or a commit",
            hint=f"write {name}@main, or the 40 hex digits of a commit",
        )
    return Reference(f"{owner}/{rest[0]}", "/".join(rest[1:]), revision if at else "main")
