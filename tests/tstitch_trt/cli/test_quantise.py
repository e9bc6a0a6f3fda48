"""Quantised bundles: calibrated at every noise level, the loss told as it is, and as usable as any other bundle."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import tstitch_trt
from support.command import Command, refused
from support.compare import relative_error
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import MANIFEST, open_bundle
from tstitch_engines.bundle.manifest import Manifest, Quantisation
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.quantise.quantise import quantise
from tstitch_trt.quantise.trajectories import Trajectories, group_levels, pick_rows
from tstitch_trt.verify.verify import verify

needs_modelopt = pytest.mark.skipif(
    find_spec("modelopt") is None, reason='nvidia-modelopt is not installed: pip install ".[quant]"'
)
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None and find_spec("tensorrt_rtx") is None,
    reason='TensorRT-RTX is not installed: pip install ".[rtx]"',
)
STEPS, SAMPLES = 10, 60


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(scope="module")
def int8(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("int8") / "int8.bundle"
    quantise(tiny_pair.bundle, member="large", mode="int8", output=output, samples=SAMPLES)
    assert [path.name for path in output.parent.iterdir()] == ["int8.bundle"]
    return output


def record_of(bundle: Path) -> Quantisation:
    made = open_bundle(bundle).manifest.members["large"].quantisation
    assert made is not None
    return made


def model_of(bundle: Path) -> Path:
    opened = open_bundle(bundle)
    return opened.path(opened.manifest.members["large"].onnx[0])


def session(path: Path, *outputs: str) -> Any:
    import onnx
    import onnxruntime as ort

    model = onnx.load(path)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


# --- the rows


def test_every_noise_level_has_an_equal_share() -> None:
    timesteps = np.repeat(np.arange(10, dtype=np.float32), [40, 3, 7, 7, 7, 7, 7, 7, 7, 100])
    chosen = pick_rows(timesteps, 30, seed=0)
    assert len(set(chosen.tolist())) == 30
    assert np.unique(timesteps[chosen], return_counts=True)[1].tolist() == [3] * 10
    assert pick_rows(timesteps, 30, seed=0).tolist() == chosen.tolist()
    assert pick_rows(timesteps, 30, seed=1).tolist() != chosen.tolist()


def test_few_rows_still_reach_from_the_noisiest_to_the_cleanest() -> None:
    timesteps = np.repeat(np.arange(50, dtype=np.float32), 4)
    for count in (2, 3, 7, 49):
        levels = timesteps[pick_rows(timesteps, count, seed=0)]
        assert len(set(levels.tolist())) == count
        assert {levels.min(), levels.max()} == {0.0, 49.0}
    partly = timesteps[pick_rows(timesteps, 75, seed=0)]
    assert np.unique(partly, return_counts=True)[1].tolist().count(2) == 25, "the second round is spread as well"
    assert len(pick_rows(timesteps, 1000, seed=0)) == 200, "no row twice"


def test_levels_are_grouped_from_the_noisiest_on() -> None:
    timesteps = np.array([0, 5, 9, 5, 0, 7], np.float32)
    assert [timesteps[part].tolist() for part in group_levels(timesteps, 2)] == [[9, 7], [0, 5, 5, 0]]
    assert len(group_levels(timesteps, 10)) == 4


# --- the bundle


@needs_modelopt
def test_the_range_is_that_of_all_noise_levels(int8: Path, tiny_pair: TinyPair, tmp_path: Path) -> None:
    """The ranges equal what the rows of all levels reach, and the rows of no single level reach all of them."""
    import onnx

    source = open_bundle(tiny_pair.bundle)
    made = record_of(int8)
    walks = Trajectories(source, options=PlanOptions(guidance=1.5), folder=tmp_path, threads=0, tick=lambda: None)
    try:
        parts = [walks.record("large", schedule, range(4)) for schedule in made.schedules]
    finally:
        walks.close()
    rows = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    chosen = pick_rows(rows["timestep"], SAMPLES, seed=0)
    rows = {key: values[chosen] for key, values in rows.items()}

    graph = onnx.load(model_of(int8)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    plain = {node.name: node for node in onnx.load(model_of(tiny_pair.bundle)).graph.node}
    ranges = {}
    for node in graph.node:
        if node.op_type == "MatMul" and makers[node.input[0]].op_type == "DequantizeLinear":
            scale = stored[makers[makers[node.input[0]].input[0]].input[1]]
            ranges[plain[node.name].input[0]] = 127 * float(onnx.numpy_helper.to_array(scale))
    assert len(ranges) == 8
    values = dict(zip(ranges, session(model_of(tiny_pair.bundle), *ranges).run(list(ranges), rows), strict=True))
    for name, top in ranges.items():
        assert top == pytest.approx(float(abs(values[name]).max()), rel=2e-3), name
    for level in np.unique(rows["timestep"]):
        at = rows["timestep"] == level
        # ten times what the ranges may be off above
        assert any(abs(values[name][at]).max() < 0.98 * top for name, top in ranges.items()), level


@needs_modelopt
def test_the_loss_is_kept_by_noise_level(int8: Path) -> None:
    made = record_of(int8)
    assert made.rows == SAMPLES
    assert made.timesteps[0] > 850
    assert made.timesteps[1] == 0
    assert len(made.loss) == STEPS == made.steps
    assert [level.timesteps[0] for level in made.loss] == sorted((p.timesteps[0] for p in made.loss), reverse=True)
    assert sum(level.rows for level in made.loss) == SAMPLES
    for level in made.loss:
        assert 1e-4 < level.rel_l2 < 5e-2
        assert 0.99 < level.cosine < 1
        assert level.max_abs > 0
    assert len(made.latents) == len(made.latents_seeds) == 4
    assert 0 < max(made.latents) < 5e-2
    assert made.schedules == ("large", "small:0.4,large")


@needs_modelopt
def test_the_loss_is_what_onnx_runtime_finds_on_other_inputs(int8: Path, tiny_pair: TinyPair, tmp_path: Path) -> None:
    walks = Trajectories(
        open_bundle(tiny_pair.bundle), options=PlanOptions(guidance=1.5), folder=tmp_path, threads=0, tick=lambda: None
    )
    try:
        rows = walks.record("large", "large", range(900, 908))
    finally:
        walks.close()
    (want,), (got,) = (session(model_of(bundle)).run(None, rows) for bundle in (tiny_pair.bundle, int8))
    for level in record_of(int8).loss:
        at = (rows["timestep"] <= level.timesteps[0]) & (rows["timestep"] >= level.timesteps[1])
        assert level.rel_l2 == pytest.approx(np.linalg.norm(got[at] - want[at]) / np.linalg.norm(want[at]), rel=0.5), (
            level.timesteps
        )


@needs_modelopt
def test_everything_else_is_as_it_was(int8: Path, tiny_pair: TinyPair) -> None:
    before, after = open_bundle(tiny_pair.bundle).manifest, open_bundle(int8).manifest
    assert after.members["small"] == before.members["small"]
    large = after.members["large"]
    assert (large.precision, before.members["large"].precision) == ("int8", "fp32")
    assert large.check is None
    assert {record.identity.precision for record in large.engines} == {"int8"}
    kept = msgspec.structs.replace(
        after, members={**after.members, "large": before.members["large"]}, versions=before.versions
    )
    assert kept == before
    assert after.versions["nvidia-modelopt"]
    named = {part.path for part in after.components()} | {MANIFEST}
    assert {str(path.relative_to(int8)) for path in int8.rglob("*") if path.is_file()} == named


@needs_modelopt
def test_it_samples_close_to_the_unquantised_one(int8: Path, tiny_pair: TinyPair) -> None:
    settings: dict[str, Any] = {"labels": [1, 2, 3], "seed": 77, "steps": 8, "fraction": 0.25, "guidance": 1.5}
    latents = []
    for bundle in (tiny_pair.bundle, int8):
        with tstitch_trt.load(bundle) as runtime:
            latents.append(runtime.sample(**settings).latents)
    assert 0 < relative_error(latents[1], latents[0]) < 5e-2


@needs_modelopt
def test_verify_holds_its_engine_against_its_graph(int8: Path) -> None:
    checks = {check.member: check for check in verify(int8, samples=1).engines}
    assert checks["large"].status == "passed", checks["large"].reason
    assert checks["large"].precision == "int8"
    assert {c.against for c in checks["large"].comparisons} == {"onnxruntime"}, "PyTorch has no such module"


@needs_modelopt
@needs_rtx
def test_int8_compiles_for_every_gpu_of_tensorrt_rtx(int8: Path, tmp_path: Path, run: Command) -> None:
    from tstitch_engines.backends.tensorrt import read_plan_header

    outcome = run("build", int8, "--backend", "tensorrt-rtx", "-o", tmp_path / "rtx.bundle")
    assert outcome.code == 0, outcome.err
    opened = open_bundle(tmp_path / "rtx.bundle")
    large = opened.manifest.members["large"]
    record = next(e for e in large.engines if e.identity.backend == "tensorrt-rtx")
    assert record.identity.precision == "int8"
    header = read_plan_header(opened.path(record.files[0]))
    assert header is not None
    assert {(8, 6), (8, 9), (12, 0)} <= set(header.capabilities)
    assert large.quantisation == record_of(int8), "the loss goes along"


@needs_modelopt
@needs_rtx
def test_fp8_compiles_for_gpus_with_float8_only(tiny_pair: TinyPair, tmp_path: Path, run: Command) -> None:
    from tstitch_engines.backends.tensorrt import read_plan_header

    fp8 = tmp_path / "fp8.bundle"
    outcome = run(
        "quantise", tiny_pair.bundle, "--member", "large", "--mode", "fp8", "--samples", SAMPLES, "--keep",
        "blocks.0.attn.qkv", "--schedule", "large", "--seed", 3, "-o", fp8, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    made = outcome.json
    assert made["precision"] == "fp8"
    assert made["kept"] == ["blocks.0.attn.qkv"]
    assert made["loss"] == json.loads(msgspec.json.encode(record_of(fp8).loss))
    assert max(level["rel_l2"] for level in made["loss"]) < 5e-2
    for chosen, words in ((), "default list"), (("--option", "compute-capabilities=8.6,8.9"), "capability 8.6"):
        refused(run("build", fp8, "--backend", "tensorrt-rtx", *chosen), words, "compute-capabilities=8.9,12.0")
    done = run("build", fp8, "--backend", "tensorrt-rtx", "--option", "compute-capabilities=8.9,12.0")
    assert done.code == 0, done.err
    opened = open_bundle(fp8)
    record = next(e for e in opened.manifest.members["large"].engines if e.identity.backend == "tensorrt-rtx")
    header = read_plan_header(opened.path(record.files[0]))
    assert header is not None
    assert header.capabilities == ((8, 9), (12, 0))
    # and the commands that make it again are known
    again = opened.rebuild_command
    for words in ("--mode fp8", "--seed 3", "--schedule large", "--keep blocks.0.attn.qkv"):
        assert words in again


@needs_modelopt
def test_a_half_precision_source_and_what_a_user_sees(tiny_pair: TinyPair, tmp_path: Path, run: Command) -> None:
    source, output = tmp_path / "fp16.bundle", tmp_path / "int8.bundle"
    members = {name: tiny_pair.checkpoint(name) for name in ("small", "large")}
    build(
        tiny_pair.recipe("small", "large"),
        members=members,
        output=source,
        precision={"large": "fp16"},
        profile=Range(1, 4, 8),
    )
    outcome = run(
        "quantise", source, "--member", "large", "--mode", "int8", "--steps", 4, "--samples", 16, "-o", output
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["timesteps", "inputs", "rel", "L2", "cosine", "max", "abs"]
    assert len(lines) == 2 + 4 + 2
    assert lines[-1] == str(output)
    assert "8 layers in int8" in outcome.err
    assert "modelopt][onnx" not in outcome.err + outcome.out, "what the library prints is kept away"
    inspected = run("inspect", output)
    assert "quantised  from fp16: 8 layers in int8" in inspected.out
    assert {spec.dtype for spec in open_bundle(output).manifest.members["large"].inputs} == {"float32", "int64"}
    grid = tmp_path / "grid.png"
    assert run("sample", output, "--labels", "3,5", "--steps", 4, "-o", grid).code == 0


# --- refusals


@needs_modelopt
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--member", "larg"), ("unknown member 'larg'", "did you mean 'large'?")),
        (("--mode", "int4"), ("unknown quantisation mode 'int4'; known: int8, fp8",)),
        (("--calibration", "mean"), ("known: max, entropy",)),
        (("--mode", "fp8", "--calibration", "entropy"), ("calibration 'entropy' is for int8", "--calibration")),
        (("--high-precision", "tf32"), ("known: fp16, bf16, fp32",)),
        (("--schedule", "small"), ("'large' runs at none of the 10 steps", "--schedule large")),
        (("--schedule", "tiny,large"), ("unknown member 'tiny'",)),
        (("--solver", "ddmi"), ("unknown solver 'ddmi'", "'ddpm'")),
        (("--samples", "0"), ("--samples",)),
        (("--keep", "blocks.7.*"), ("unknown layer 'blocks.7.*'", "blocks.0.attn.qkv")),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    tiny_pair: TinyPair, tmp_path: Path, run: Command, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    words = {"--member": "large", "--mode": "int8", "--steps": "10", "--samples": "4"}
    words |= dict(zip(options[::2], options[1::2], strict=True))
    flat = [word for pair in words.items() for word in pair]
    refused(run("quantise", tiny_pair.bundle, *flat, "-o", tmp_path / "new.bundle"), *parts)
    assert not list(tmp_path.iterdir())


@needs_modelopt
def test_an_existing_output_is_not_replaced(tiny_pair: TinyPair, tmp_path: Path, run: Command) -> None:
    kept = tmp_path / "new.bundle"
    kept.mkdir()
    (kept / "mine").write_text("x")
    outcome = run("quantise", tiny_pair.bundle, "--member", "large", "--mode", "int8", "-o", kept)
    refused(outcome, "new.bundle exists already", "-o DIR")
    assert [path.name for path in kept.iterdir()] == ["mine"]


@needs_modelopt
def test_a_quantised_member_is_no_source(int8: Path, tmp_path: Path, run: Command) -> None:
    outcome = run("quantise", int8, "--member", "large", "--mode", "fp8", "-o", tmp_path / "new.bundle")
    refused(outcome, "member 'large' is quantised already (int8)", "quantise the bundle it was made from")


def test_without_modelopt(tiny_pair: TinyPair, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tstitch_export.quantise.quantise.find_spec", lambda name: None if name == "modelopt" else find_spec(name)
    )
    outcome = run("quantise", tiny_pair.bundle, "--member", "large", "--mode", "int8", "-o", tmp_path / "new.bundle")
    refused(outcome, "nvidia-modelopt", 'pip install "tstitch-trt[cpu,quant]"')


@needs_modelopt
@pytest.mark.parametrize("moment", ["recording", "quantising"])
def test_ctrl_c_leaves_nothing(tiny_pair: TinyPair, tmp_path: Path, moment: str) -> None:
    source = tmp_path / "source.bundle"
    shutil.copytree(tiny_pair.bundle, source)
    script = (
        "import sys\nfrom tstitch_trt.quantise.quantise import quantise\n"
        "def report(text, share):\n    if text.startswith(sys.argv[3]): print('ready', flush=True)\n"
        "quantise(sys.argv[1], member='large', mode='int8', output=sys.argv[2], progress=report)"
    )
    arguments = [sys.executable, "-c", script, str(source), str(tmp_path / "new.bundle"), moment]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            if moment == "quantising":
                time.sleep(1.0)  # the worker is at work
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode != 0
    assert "KeyboardInterrupt" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source.bundle"]


@needs_modelopt
def test_a_full_disk_is_named_and_leaves_nothing(tiny_pair: TinyPair, tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from tstitch_engines.errors import BuildFailed\n"
        "from tstitch_trt.quantise.quantise import quantise\n"
        "def report(text, share):\n    if text.startswith('quantising'):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "try:\n"
        "    quantise(sys.argv[1], member='large', mode='int8', output=sys.argv[2], samples=60, progress=report)\n"
        "except BuildFailed as error:\n    print(error)\n    raise SystemExit(7)"
    )
    for limit in (1 << 14, 1 << 17):  # too little for the calibration rows, then for the worker's graph
        arguments = [sys.executable, "-c", script, str(tiny_pair.bundle), str(tmp_path / "new.bundle"), str(limit)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 7, done.stderr
        assert "hint: " in done.stdout
        assert not list(tmp_path.iterdir())


def test_manifests_without_quantisation_are_read_as_before(tiny_pair: TinyPair) -> None:
    document = json.loads((tiny_pair.bundle / MANIFEST).read_text())
    for member in document["members"].values():
        del member["quantisation"]
    assert msgspec.convert(document, Manifest) == open_bundle(tiny_pair.bundle).manifest
