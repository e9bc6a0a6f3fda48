"""``benchmarks/peers.py``: who is compared draws the same latents, who does not is refused, nothing is timed twice."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import open_bundle

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

# diffusers calls np.array on tensors, which NumPy 2 wants spelled otherwise
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONTENDERS = "ours:onnxruntime,torch-eager,diffusers"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    folder: Path

    @property
    def document(self) -> Any:
        return json.loads((self.folder / "peers.json").read_text())


Peers = Callable[..., Outcome]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Peers:
    """Runs the script in this process: two images, four steps, one thread."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # else the script sets it for all tests
    main = importlib.import_module("peers").main

    def run(bundle: Path, *more: object, contenders: str = CONTENDERS, repeats: int = 2) -> Outcome:
        words = f"--steps 4 --batch 2 --threads 1 --repeats {repeats} --contenders {contenders}".split()
        places = ["--out", tmp_path / "out", "--scratch", tmp_path / "scratch"]
        capfd.readouterr()
        code = main([str(word) for word in (bundle, *words, *places, *more)])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err, tmp_path / "out")

    return run


@pytest.mark.parametrize("more", [(), ("--solver", "dpmpp-2m", "--guidance", 1.5)])
def test_all_draw_the_same_and_the_record_is_whole(
    peers: Peers, fashion_bundle: Path, more: tuple[object, ...]
) -> None:
    threads = torch.get_num_threads()
    done = peers(fashion_bundle, "--seed", 7, *more)
    assert done.code == 0, done.err
    assert torch.get_num_threads() == threads
    said = done.document
    assert said["bundle"] == "fashion"
    assert set(said["weights"]) == {"small", "large"}
    assert {"numpy", "torch", "onnxruntime", "diffusers", "tstitch-trt"} <= set(said["versions"])
    assert said["machine"]["cores"] >= 1
    assert said["command"].startswith("python benchmarks/peers.py ")
    assert "--seed 7" in said["command"]
    assert (said["steps"], said["batch"], said["threads"], said["seed"], said["repeats"]) == (4, 2, 1, 7, 2)
    assert said["schedules"] == {"0": "large:4", "0.4": "small:2,large:2", "1": "small:4"}
    assert said["compared_with"] == "ours:onnxruntime"
    assert said["tolerance"] == 1e-3
    assert len(said["loads"]) == 2
    assert [each["name"] for each in said["contenders"]] == CONTENDERS.split(",")
    ours = said["contenders"][0]["trajectories"]
    for contender in said["contenders"]:
        assert contender["what"]
        assert contender["first_walks_s"] > 0
        assert contender["load_s"] > 0
        assert [t["fraction"] for t in contender["trajectories"]] == [0, 0.4, 1]
        for t, reference in zip(contender["trajectories"], ours, strict=True):
            assert t["relative_difference"] < 1e-4
            assert (t["relative_difference"] == 0) == (contender["name"] == "ours:onnxruntime")
            assert len(t["rounds_ms"]) == 2
            assert 0 < t["p10_ms"] <= t["ms"] <= t["p90_ms"]
            assert t["ms"] == pytest.approx(statistics.median(t["rounds_ms"]), rel=1e-3)
            ratios = [theirs / mine for theirs, mine in zip(t["rounds_ms"], reference["rounds_ms"], strict=True)]
            assert t["speedup_of_ours"] == pytest.approx(statistics.median(ratios), rel=1e-3)
            assert t["images_per_second"] == pytest.approx(2000 / t["ms"])
    assert done.out == (done.folder / "peers.md").read_text()
    assert "| diffusers | 40% |" in done.out
    with Image.open(done.folder / "peers.png") as image:
        assert image.size[0] > 1000


def test_it_goes_on_after_the_last_finished_round(
    peers: Peers, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("peers")
    timed, calls = script.timed, []

    def interrupted(*args: object) -> float:
        calls.append(args)
        if len(calls) > 2 * 9 + 4:  # in the middle of the second round that is kept
            raise KeyboardInterrupt
        found: float = timed(*args)
        return found

    monkeypatch.setattr(script, "timed", interrupted)
    stopped = peers(tiny_pair.bundle, repeats=3)
    assert stopped.code == 130
    assert "goes on from here" in stopped.err
    assert not (stopped.folder / "peers.json").exists()
    (path,) = (tmp_path / "scratch").glob("*/rounds.json")
    (kept,) = json.loads(path.read_text())
    monkeypatch.setattr(script, "timed", timed)
    done = peers(tiny_pair.bundle, repeats=3)
    assert done.code == 0, done.err
    assert "going on after 1 of 3 rounds" in done.err
    for contender in done.document["contenders"]:
        for t in contender["trajectories"]:
            first = kept["ms"][f"{t['fraction']:g}"][contender["name"]]
            assert t["rounds_ms"][0] == pytest.approx(first, abs=1e-3)
            assert len(t["rounds_ms"]) == 3
    monkeypatch.setattr(script, "timed", interrupted)  # nothing is left to be timed
    again = peers(tiny_pair.bundle, repeats=3)
    assert again.code == 0, again.err
    assert again.document["contenders"][1]["trajectories"] == done.document["contenders"][1]["trajectories"]
    assert peers(tiny_pair.bundle, "--seed", 1, repeats=3).code == 130  # other work: its own rounds


def test_who_draws_something_else_is_refused_before_anything_is_timed(
    peers: Peers, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spoiled: diffusers is told that the large member, a v model, predicts the noise."""
    contenders = importlib.import_module("gpubench.contenders")
    make = contenders.diffusers_schedulers

    def spoiled(*args: object, **settings: object) -> dict[str, Any]:
        return dict.fromkeys(("small", "large"), make(*args, **settings)["small"])

    monkeypatch.setattr(contenders, "diffusers_schedulers", spoiled)
    done = peers(tiny_pair.bundle, "--fractions", "1,0.4")  # at fraction 1 the large member does not run
    assert done.code == 1
    assert "diffusers draws other latents than ours:onnxruntime at fraction 0.4: relative difference " in done.err
    number = done.err.partition("relative difference ")[2].partition(";")[0]
    assert float(number) > 1e-2
    assert "hint:" in done.err
    assert not list(done.folder.glob("peers.*"))
    assert not list((tmp_path / "scratch").glob("*/rounds.json"))


def test_an_option_of_a_backend_is_built_beside(peers: Peers, tiny_pair: TinyPair, tmp_path: Path) -> None:
    name = "ours:onnxruntime+graph-optimisation=basic"
    before = (tiny_pair.bundle / "manifest.json").read_bytes()
    done = peers(tiny_pair.bundle, contenders=f"{name},ours:onnxruntime", repeats=1)
    assert done.code == 0, done.err
    assert done.document["compared_with"] == name
    assert done.document["contenders"][0]["build_s"] > 0
    (built,) = (tmp_path / "scratch").glob("*.bundle")
    for member in open_bundle(built).manifest.members.values():
        assert member.engines[0].identity.options == {"graph-optimisation": "basic"}
    assert (tiny_pair.bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("more", [(), ("--solver", "dpmpp-2m", "--guidance", 2)])
def test_whole_steps_are_captured_and_equal(
    peers: Peers, tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...]
) -> None:
    """``fullgraph=True`` refuses a step that has to be cut. What TorchInductor makes of the graph, which takes minutes,
    is compared by the benchmark itself whenever it runs: here the captured graph runs as it is. As those of recorded
    CUDA graphs its outputs are gone when the next step begins."""
    compile_, modes, outputs = torch.compile, set(), []

    def capture(step: Any, *, mode: str, **settings: Any) -> Any:
        modes.add(mode)
        graph = compile_(step, backend="eager", **settings)

        def run(*args: Any) -> Any:
            found = graph(*args)
            outputs.extend(found if isinstance(found, tuple) else (found,))
            return found

        return run

    def begin() -> None:
        for output in outputs:
            output.fill_(float("nan"))
        outputs.clear()

    monkeypatch.setattr(torch, "compile", capture)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", begin)
    torch.compiler.reset()
    done = peers(tiny_pair.bundle, *more, contenders="ours:onnxruntime,torch-compile", repeats=1)
    assert done.code == 0, done.err
    assert modes == {"default"}
    compiled = done.document["contenders"][1]
    assert "torch.compile" in compiled["what"]
    assert all(t["relative_difference"] < 1e-4 for t in compiled["trajectories"])


@pytest.mark.parametrize(
    ("contenders", "more", "parts"),
    [
        ("ours:onnxruntime,difusers", (), ("'difusers'", "diffusers")),
        ("torch-eager,diffusers", (), ("at least one of them ours:BACKEND", "hint:")),
        ("ours:onnxruntime,ours:onnxruntime", (), ("allowed are different ones",)),
        (CONTENDERS, ("--batch", 9), ("batch 9", "1 to 8")),
        (CONTENDERS, ("--batch", 5, "--guidance", 2), ("batch 5", "1 to 4")),
        (CONTENDERS, ("--repeats", 0), ("--repeats 0", "1 or more")),
        (CONTENDERS, ("--solver", "dpmpp-2m"), ("predict eps and v", "--solver ddim")),
        ("ours:torch,torch-eager", (), ("not compiled from ONNX", "hint: leave ours:torch out")),
        ("ours:onnxruntime+graph-optimization=basic", (), ("graph-optimisation",)),
    ],
)
def test_bad_input_is_refused_with_a_hint(
    peers: Peers, tiny_pair: TinyPair, contenders: str, more: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    done = peers(tiny_pair.bundle, *more, contenders=contenders)
    assert done.code == 2
    assert "error: " in done.err
    for part in parts:
        assert part in done.err
    assert done.out == ""
    assert not list(done.folder.glob("peers.*"))
