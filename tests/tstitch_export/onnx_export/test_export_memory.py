"""An export that can't fit into memory is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tiny import TinyPair
from tstitch_engines.errors import OutOfMemory
from tstitch_export.build import build


def test_weights_larger_than_the_limit_are_refused(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OutOfMemory, match=r"exporting member small needs .*KiB of memory or more .*its limit is") as e:
        build(
            tiny_pair.recipe("small"),
            members={"small": tiny_pair.checkpoint("small")},
            output=tmp_path / "a.bundle",
            memory_limit="10kB",
        )
    assert "--memory-limit" in e.value.hint
    assert not (tmp_path / "a.bundle").exists()
