"""What a compilation is said to take: by what was measured here, by the size, or honestly unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tstitch_engines.backends.tensorrt.estimate import Build, estimate, recorded
from tstitch_engines.bundle.cache import Cache

GB = 10**9


def test_a_measured_build_of_the_same_onnx_counts_alone() -> None:
    builds = [Build("a", GB, 50.0), Build("a", GB, 70.0), Build("b", GB, 1000.0)]
    found = estimate(GB, streamed=True, timed=True, onnx_sha256="a", builds=builds)
    assert found.seconds == 60
    assert found.memory == (1 << 30) + 2 * GB
    assert str(found) == "about 2.9 GiB of memory and 60 s (measured here on the same ONNX, 2 times)"


def test_other_models_give_a_guess_by_their_size_and_nothing_gives_none() -> None:
    builds = [Build("a", GB, 50.0), Build("b", 2 * GB, 300.0), Build("c", GB, 60.0)]
    guess = estimate(4 * GB, streamed=False, timed=True, onnx_sha256="d", builds=builds)
    assert guess.seconds == pytest.approx(240)
    assert guess.memory == (1 << 30) + 12 * GB
    assert "a guess from 3 other models" in str(guess)
    unknown = estimate(GB, streamed=True, timed=True, onnx_sha256="a")
    assert unknown.seconds is None
    assert "unknown time (the cache has no earlier build of this backend for this GPU" in str(unknown)


def test_without_timing_the_size_tells_until_the_same_model_was_measured() -> None:
    other = [Build("b", GB, 500.0)]
    assert estimate(GB, streamed=True, timed=False, onnx_sha256="a", builds=other).seconds == 3 + 8
    same = [Build("a", GB, 4.0)]
    assert estimate(GB, streamed=True, timed=False, onnx_sha256="a", builds=same).seconds == 4


def test_the_cache_s_records_are_read_and_those_of_other_kinds_passed_over(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def put(letter: str, **info: Any) -> None:
        def make(folder: Path) -> dict[str, Any]:
            (folder / "engine").write_bytes(b"x")
            return info

        cache.put(letter * 64, make)

    measured = {"backend": "tensorrt", "arch": "sm_90", "onnx_sha256": "s", "onnx_bytes": 7, "seconds": 2.5}
    put("a", **measured)
    put("b", **(measured | {"arch": "sm_80"}))
    put("c", **(measured | {"backend": "onnxruntime"}))
    put("d", files=["engine"])  # an older version's
    put("e", **(measured | {"seconds": None}))
    assert recorded(cache.stored(), backend="tensorrt", arch="sm_90") == [Build("s", 7, 2.5)]
