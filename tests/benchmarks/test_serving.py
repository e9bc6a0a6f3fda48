"""``benchmarks/serving.py``: arrivals that a seed fixes, figures that count what never came, and a run of it all."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.errors import BadInput, FailedWork

Serving = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def asks() -> ModuleType:
    return importlib.import_module("servingbench.asks")


@pytest.fixture
def figures() -> ModuleType:
    return importlib.import_module("servingbench.figures")


# --- who asks, and when


@pytest.mark.parametrize("arrivals", ["poisson", "burst"])
def test_arrivals_have_the_rate_and_are_spread(asks: ModuleType, arrivals: str) -> None:
    def drawn(seed: int) -> list[float]:
        return asks.arrival_times(arrivals, 20.0, 2000.0, random.Random(seed))

    times = drawn(1)
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 2000
    assert len(times) == pytest.approx(40_000, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    variation = statistics.stdev(gaps) / statistics.mean(gaps)  # 1 for a Poisson process
    assert variation == pytest.approx(1, rel=0.05) if arrivals == "poisson" else variation > 2
    assert times == drawn(1)
    assert times != drawn(2)


def test_requests_are_fixed_by_the_seed_and_cover_the_mix(asks: ModuleType, fashion_bundle: Path) -> None:
    manifest = open_bundle(fashion_bundle).manifest
    mix = asks.MIXES["mixed"]
    make = lambda seed: asks.make_asks(  # noqa: E731
        manifest, mix, arrivals="poisson", rate=50, seconds=60, seed=seed
    )
    first = make("0 mixed 1")
    assert first == make("0 mixed 1")
    assert first != make("1 mixed 1")
    assert {ask.kind for ask in first} == mix.kinds()
    assert {label for ask in first for label in ask.labels} == set(range(10))
    assert all(len(ask.labels) == len(ask.seeds) == ask.kind.images for ask in first)


def test_a_recorded_trace_is_replayed_at_another_rate(asks: ModuleType, fashion_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(fashion_bundle).manifest
    mix = asks.MIXES["mixed"]
    recorded = asks.make_asks(manifest, mix, arrivals="burst", rate=10, seconds=30, seed="x")
    path = tmp_path / "trace.jsonl"
    asks.write_trace(path, recorded)
    trace = asks.read_trace(path)
    assert [row.kind for row in trace] == [ask.kind for ask in recorded]
    rate = 2 * len(trace) / trace[-1].at
    replayed = asks.make_asks(manifest, mix, arrivals="trace", rate=rate, seconds=1e3, seed="y", trace=trace)
    assert [ask.kind for ask in replayed] == [ask.kind for ask in recorded]
    assert [ask.at for ask in replayed] == pytest.approx([ask.at / 2 for ask in recorded], rel=1e-3)
    path.write_text('{"at": 0.5}\n{"at": 2}\n')  # times alone
    drawn = asks.make_asks(manifest, mix, arrivals="trace", rate=1, seconds=1e3, seed="y", trace=asks.read_trace(path))
    assert [ask.at for ask in drawn] == [0.5, 2]
    assert {ask.kind for ask in drawn} <= mix.kinds()


@pytest.mark.parametrize(
    "text", ["", "nonsense\n", '{"at": -1}\n', '{"at": 2}\n{"at": 1}\n', '{"at": 1, "kind": {}}\n']
)
def test_a_bad_trace_is_refused(asks: ModuleType, tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"the trace .*trace\.jsonl"):
        asks.read_trace(path)


# --- figures


def test_percentiles_are_the_nearest_rank_and_keep_what_never_came(figures: ModuleType) -> None:
    values = [float(i) for i in range(1, 101)]
    assert [figures.percentile(values, share) for share in (0.0, 0.5, 0.95, 0.99, 1.0)] == [1, 50, 95, 99, 100]
    assert figures.percentile([3.0], 0.95) == 3
    lost = [1.0] * 94 + [math.inf] * 6
    assert math.isinf(figures.percentile(lost, 0.95))
    assert figures.percentile(lost, 0.94) == 1
    assert math.isnan(figures.percentile([], 0.5))


def test_goodput_counts_each_request_against_its_own_limit(figures: ModuleType) -> None:
    served = [
        figures.Served(at=0, images=1, alone=0.1, latency=0.39),  # within 4 times
        figures.Served(at=1, images=1, alone=0.1, latency=0.41),
        figures.Served(at=2, images=1, alone=1.0, latency=0.41),
        figures.Served(at=3, images=1, alone=1.0, error="HTTP 429"),
    ]
    parse = figures.Limit.parse
    assert figures.within(served, parse("4x")) == 0.5
    assert figures.within(served, parse("400ms")) == 0.25
    assert figures.within(served, parse("4x+500ms")) == 0.75  # at least 500 ms
    assert math.isinf(figures.strain(served, parse("4x")))
    assert figures.strain(served[:3], parse("4x")) == pytest.approx(0.41 / 0.4)
    for text in ("4", "x", "-1ms", "0x", "nanms", "4x+", "4x200ms", ""):
        with pytest.raises(BadInput, match="--limits"):
            parse(text)


def test_the_sustained_rate_lies_where_the_limit_just_holds(figures: ModuleType) -> None:
    def told(points: dict[float, float]) -> tuple[float, str]:
        found = figures.sustained(points)
        return found.rate, found.bound

    assert told({1: 0.5, 2: 2.0, 3: 8.0}) == (pytest.approx(1.5), "")  # half way in the logarithm
    assert told({1: 0.5, 2: 0.7}) == (2, "at least")
    assert told({1: 1.5, 2: 3.0}) == (1, "below")
    assert told({1: 0.5, 2: math.inf}) == (1, "")
    assert told({1: 0.5, 2: 1.0, 3: 1.5}) == (2, "")


def test_a_ratio_of_bounds_says_what_is_known(figures: ModuleType) -> None:
    def ratio(ours: str, theirs: str) -> str:
        return figures.Sustained(rate=3.0, bound=ours).over(figures.Sustained(rate=2.0, bound=theirs))

    assert ratio("", "") == "1.50"
    assert ratio("at least", "") == ratio("", "below") == ratio("at least", "below") == "at least 1.50"
    assert ratio("below", "") == ratio("", "at least") == "below 1.50"
    assert ratio("at least", "at least") == ratio("below", "below") == "about 1.50"


# --- all of it


@pytest.fixture
def serving(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Serving:
    main = importlib.import_module("serving").main

    def run(bundle: Path, *more: str) -> tuple[int, str, str]:
        places = ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch"), "--name", "test"]
        capfd.readouterr()
        code = main([str(bundle), *places, *more])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_servers_are_compared_measured_and_not_measured_again(
    serving: Serving, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("litserve")
    words = ["--steps", "2,4", "--fractions", "0,0.5", "--loads", "0.2,0.3", "--seconds", "1", "--mixes", "mixed"]
    words += ["--contenders", "single,engine", "--limits", "1ms"]  # which nobody meets
    code, out, err = serving(tiny_pair.bundle, *words)
    assert code == 0, err
    assert out == (tmp_path / "out" / "serving-test.md").read_text()
    record = json.loads((tmp_path / "out" / "serving-test.json").read_text())
    assert record["command"].startswith("python benchmarks/serving.py ")
    assert record["compared_with"] == "single"
    assert all(each["largest_difference"] <= record["tolerance"] == 2 for each in record["contenders"])
    (mix,) = record["mixes"]
    load, larger = mix["loads"]
    assert larger["contenders"].keys() == {"single"}  # whose pictures the others would be compared with
    assert load["rate"] == pytest.approx(0.2 * mix["capacity"])
    for found in load["contenders"].values():
        assert found["answered"] > 0
        assert found["errors"] == {}
        assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]
        assert found["lanes_per_call"] >= 1
        assert found["cpu_seconds"] > 0
        assert found["peak_bytes"] > 50 << 20
    assert load["contenders"]["engine"]["overhead_share"] > 0
    with Image.open(tmp_path / "out" / "serving-test.png") as image:
        assert image.size[0] > 1000

    def none(*_: object) -> None:
        raise AssertionError("a server was started for what was measured before")

    monkeypatch.setattr(importlib.import_module("serving"), "Client", none)
    code, again, err = serving(tiny_pair.bundle, *words)
    assert code == 0, err
    assert again.splitlines()[1:] == out.splitlines()[1:]


def test_other_pictures_are_refused() -> None:
    check = importlib.import_module("servingbench.measure").check
    want = np.full((1, 8, 8, 1), 100, np.uint8)
    assert check("engine", "single", "a request", want + 2, want) == 2
    for got in (want - 3, want[:, :4], np.zeros_like(want)):
        with pytest.raises(FailedWork, match="engine draws other pictures than single, a request"):
            check("engine", "single", "a request", got, want)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--contenders", "single,enigne"], ("'enigne'", "engine")),
        (["--contenders", "single,single"], ("names one twice",)),
        (["--mixes", "mixt"], ("'mixt'", "mixed")),
        (["--limits", "fast"], ("--limits", "4x+200ms")),
        (["--loads", "0"], ("--loads 0", "hint:")),
        (["--arrivals", "trace"], ("--trace FILE",)),
    ],
)
def test_bad_input_is_refused_with_a_hint(
    serving: Serving, tiny_pair: TinyPair, words: list[str], parts: tuple[str, ...]
) -> None:
    code, out, err = serving(tiny_pair.bundle, *words)
    assert code == 2
    assert out == ""
    for part in parts:
        assert part in err
