"""Bundles the tests share, built once; the component cache of the user who runs the tests is left alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import TinyPair


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("TSTITCH_TRT_CACHE")
    os.environ["TSTITCH_TRT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["TSTITCH_TRT_CACHE"]
    else:
        os.environ["TSTITCH_TRT_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return TinyPair(Path(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def fashion_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in pair, built once from what the package ships."""
    from tstitch_export.build import build

    output = tmp_path_factory.mktemp("fashion") / "fashion.bundle"
    build("fashion", output=output)
    return output
