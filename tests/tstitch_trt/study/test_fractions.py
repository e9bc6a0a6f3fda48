"""One request at several fractions: what is drawn is what the runtime draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import tstitch_trt
from support.manifests import manifest, member
from tstitch_engines.bundle.manifest import Conditioning
from tstitch_engines.errors import BadSchedule, UnknownName
from tstitch_engines.progress import silent
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.fractions import draw_fractions, requests_at

PICTURES: dict[str, Any] = {"labels": [3], "n": 2, "seed": 7}
SETTINGS: dict[str, Any] = {"steps": 4, "solver": "ddim", "guidance": 1.5}


@pytest.fixture(scope="module")
def runtime(fashion_bundle: Path) -> Iterator[Runtime]:
    with tstitch_trt.load(fashion_bundle, threads=1) as loaded:
        yield loaded


def test_each_fraction_is_what_the_runtime_draws(runtime: Runtime) -> None:
    shares: list[float] = []
    tell = lambda phase, share: shares.append(share)  # noqa: E731
    found = list(draw_fractions(runtime, [0.0, 0.5, 1.0], PICTURES, SETTINGS, tell))
    assert [drawn.fraction for drawn in found] == [0.0, 0.5, 1.0]
    for drawn in found:
        wanted = runtime.sample(labels=[3], n=2, seed=7, steps=4, guidance=1.5, fraction=drawn.fraction).images
        np.testing.assert_array_equal(drawn.images, wanted)
        assert drawn.ms > 0
    assert found[1].members == "2 small + 2 large"
    assert shares == pytest.approx([0, 1 / 3, 2 / 3])


def test_what_can_not_be_drawn_is_refused_before_anything_is(runtime: Runtime) -> None:
    with pytest.raises(UnknownName, match="solver"):
        next(draw_fractions(runtime, [0.0], PICTURES, {**SETTINGS, "solver": "dim"}, silent))
    with pytest.raises(BadSchedule, match="outside"):
        next(draw_fractions(runtime, [0.0, 1.5], PICTURES, SETTINGS, silent))


def test_a_negative_prompt_is_for_the_fractions_that_read_it() -> None:
    """A large member distilled for its scale reads none; a request that nobody reads it of keeps it, to be refused."""
    distilled = msgspec.structs.replace(member(), guidance_embedding=256)
    pair = manifest({"small": member(), "large": distilled}, conditioning=Conditioning(kind="text"))
    pictures = {"prompt": "a cat", "negative_prompt": "a dog"}
    found = requests_at(pair, [0.0, 0.5, 1.0], pictures, {"steps": 4, "guidance": 6.0})
    assert [request.get("negative_prompt") for request in found] == [None, "a dog", "a dog"]
    assert found[1] == {**pictures, "steps": 4, "guidance": 6.0, "fraction": 0.5}
    for fractions, guidance in (([0.0], 6.0), ([0.0, 1.0], 1.0)):
        found = requests_at(pair, fractions, pictures, {"steps": 4, "guidance": guidance})
        assert all("negative_prompt" in request for request in found)
