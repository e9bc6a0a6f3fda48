"""What is a repository's name and what a path."""

from __future__ import annotations

import pytest

from tstitch_engines.errors import BadInput
from tstitch_export.hub.reference import Reference, read_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Reference("org/name")),
        ("org/name/", Reference("org/name")),
        ("org/sd-2.1_base@v1.0", Reference("org/sd-2.1_base", "", "v1.0")),
        (f"org/name@{COMMIT}", Reference("org/name", "", COMMIT)),
        ("org/name/unet@refs/pr/1", Reference("org/name", "unet", "refs/pr/1")),
        ("org/name/a/b.safetensors", Reference("org/name", "a/b.safetensors")),
    ],
)
def test_a_repository(text: str, expected: Reference) -> None:
    assert read_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("name", "/org/name", "./org/name", "../name", "~/name", "org/../name", "org//name", "org/-name", "o--g/name"),
        *(
            "runs/ema.safetensors",
            "runs/XL.pt",
            "pairs/fashion.toml",
            "org/na me",
            "org\\x/name",
            "",
            "@main",
            "org/@x",
        ),
    ],
)
def test_a_path(text: str) -> None:
    assert read_reference(text) is None


@pytest.mark.parametrize("revision", ["", "../main", "a..b", "-x", "a b", "a//b", "x/", "a:b", "é"])
def test_a_revision_that_git_does_not_allow(revision: str) -> None:
    with pytest.raises(BadInput, match="revision"):
        read_reference(f"org/name@{revision}")
