"""API keys: only their hashes are kept, and a key is compared with all of them in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Final

from tstitch_engines.bundle.read import read_text
from tstitch_engines.checks import check_path
from tstitch_engines.errors import BadInput, first_line

__all__ = ["Keys"]

_SHORTEST: Final = 16
_LONGEST: Final = 512
_MOST_KEYS: Final = 10_000
_MOST_BYTES: Final = 8 << 20


class Keys:
    """The keys that a server knows."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = tuple({_hash(key) for key in keys})

    def __repr__(self) -> str:
        return f"Keys({len(self._hashes)})"

    @staticmethod
    def read(path: Path | str) -> Keys:
        """The keys in a file, one a line; empty lines and those that begin with ``#`` are none. Raises ``BadInput``,
        which never repeats a key."""
        path = check_path(path, "api_key_file")
        hint = "write one key a line, e.g. from: openssl rand -hex 32"
        try:
            text = read_text(path, most=_MOST_BYTES)
        except (OSError, ValueError) as error:
            raise BadInput(f"the key file {path} can't be read: {first_line(error)}", hint=hint) from None
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        keys = [(number, line) for number, line in lines if line and not line.startswith("#")]
        for number, key in keys:
            if not (_SHORTEST <= len(key) <= _LONGEST and key.isascii() and key.isprintable() and " " not in key):
                raise BadInput(
                    f"line {number} of the key file {path} is no key; allowed are {_SHORTEST} to {_LONGEST} printable "
                    "ASCII characters without spaces",
                    hint=hint,
                )
        if not 0 < len(keys) <= _MOST_KEYS:
            raise BadInput(f"the key file {path} has {len(keys):,} keys; allowed are 1 to {_MOST_KEYS:,}", hint=hint)
        return Keys(key for _, key in keys)

    def know(self, key: str) -> bool:
        """Whether ``key`` is one of them. Its time does not depend on which, nor on how much of one is right."""
        asked, known = _hash(key), False
        for each in self._hashes:
            known |= hmac.compare_digest(asked, each)
        return known


def _hash(key: str) -> bytes:
    return sha256(key.encode()).digest()
