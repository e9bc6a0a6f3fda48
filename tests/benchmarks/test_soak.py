"""``benchmarks/soak.py``: it finds nothing, and would find what it is for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.hand_made_parts import World
from tstitch_engines.bundle.bundle import Bundle
from tstitch_trt import Runtime

Soak = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return World().bundle(tmp_path_factory.mktemp("world"))


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: Bundle) -> Soak:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    main = importlib.import_module("soak").main

    def run(bundle: Path = world.root, **options: object) -> tuple[int, Any]:
        words = [str(bundle), "--out", str(tmp_path / "soak.json")]
        code = main([*words, *(part for key, value in options.items() for part in (f"--{key}", str(value)))])
        path = tmp_path / "soak.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    return run


@pytest.mark.parametrize("seconds", [8, pytest.param(600, marks=pytest.mark.slow)])
def test_eight_threads_and_no_wrong_picture(soak: Soak, seconds: int) -> None:
    code, found = soak(seconds=seconds, threads=8)
    assert (code, found["violations"]) == (0, [])
    assert found["calls"] == sum(found["calls_by_verb"].values()) > 20 * seconds
    assert {"sample", "iterate", "decode", "encode", "partial", "raises", "drops"} <= found["calls_by_verb"].keys()
    assert found["reloads"] > 0
    assert len(found["uses"]["rows"]) > 50


@pytest.mark.slow
def test_the_built_in_pair(soak: Soak, fashion_bundle: Path) -> None:
    assert soak(fashion_bundle, seconds=300)[0] == 0


def test_it_finds_pictures_of_another_thread(soak: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``decode`` does not wait for its turn, as it once did not."""

    def decode(self: Runtime, latents: Any, **_: Any) -> Any:
        return self._vae.decode(self._vae.latents(latents))

    monkeypatch.setattr(Runtime, "decode", decode)
    code, found = soak(seconds=60, threads=8)
    assert code == 1
    assert "alone" in found["violations"][0]


def test_it_finds_what_grows() -> None:
    script = importlib.import_module("soak")
    flat = [script.Use(at, 1 << 30, 40, 10) for at in range(40)]
    assert script.growth(flat) == []
    for name, step in (("memory", 4 << 20), ("files", 1), ("threads", 1)):
        uses = [use._replace(**{name: getattr(use, name) + index * step}) for index, use in enumerate(flat)]
        (found,) = script.growth(uses)
        assert found.startswith(f"{name} grew from")


def test_what_is_refused(soak: Soak, capfd: pytest.CaptureFixture[str]) -> None:
    for options in ({"seconds": 0}, {"seconds": "nan"}, {"threads": 0}, {"threads": 10**6}):
        assert soak(**options)[0] == 2
        assert "hint: e.g. --minutes 10" in capfd.readouterr().err
