"""Verifying bundles: what passes, what fails and is named, and what can't be checked and is never called passed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import tstitch_trt
from support.command import Command, refused
from support.dits import diffusers_folder
from support.tiny import TinyPair
from tstitch_engines.backends import Backend, open_backend
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.device.step_row import ROW
from tstitch_engines.host_call import from_storage, to_storage
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_trt.verify.engine_check import check_engine
from tstitch_trt.verify.error import measure_error
from tstitch_trt.verify.layers import first_difference
from tstitch_trt.verify.references import References
from tstitch_trt.verify.verify import LIMITS, verify


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def copy(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pair.bundle, tmp_path / "copy.bundle"))


def edit(bundle: Path, change: Any) -> None:
    """``change`` gets the manifest's members and alters them in place."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["members"])
    path.write_text(json.dumps(manifest))


# --- what passes


def test_the_pair_passes_at_every_batch_on_both_kinds_of_input_against_both_references(
    run: Command, tiny_pair: TinyPair
) -> None:
    outcome = run("verify", tiny_pair.bundle, "--json")
    assert outcome.code == 0, outcome.err
    said = outcome.json
    assert said["references"]["torch"] == torch.__version__
    assert [(e["member"], e["status"], e["reason"]) for e in said["engines"]] == [
        ("small", "passed", None),
        ("large", "passed", None),
    ]
    for engine in said["engines"]:
        cases = {(c["against"], c["inputs"], c["batch"]) for c in engine["comparisons"]}
        assert cases == {
            (against, kind, batch)
            for against in ("onnxruntime", "torch")
            for kind in ("random", "trajectory")
            for batch in (1, 4, 8)
        }
        assert engine["limit"] == 1e-4
        for c in engine["comparisons"]:
            assert c["passed"]
            assert 0 <= c["error"]["rel_l2"] < 1e-5
        # PyTorch adds in another order: figures of exactly zero would say that nothing was compared
        assert max(c["error"]["max_abs"] for c in engine["comparisons"] if c["against"] == "torch") > 0


def test_the_built_in_pair_passes(fashion_bundle: Path) -> None:
    result = verify(fashion_bundle, samples=1)
    assert [check.status for check in result.engines] == ["passed", "passed"]
    assert {c.batch for c in result.engines[1].comparisons} == {1, 16}


@pytest.fixture(scope="module")
def half(tiny_pair: TinyPair) -> Path:
    output = tiny_pair.folder / "half.bundle"
    members = {name: tiny_pair.checkpoint(name) for name in ("small", "large")}
    recipe = tiny_pair.recipe("small", "large")
    build(recipe, members=members, output=output, precision="fp16", profile=Range(1, 4, 8))
    return output


def test_a_half_precision_pair_passes_within_its_own_limit_and_layer_by_layer(half: Path) -> None:
    result = verify(half, samples=2, layers=True)
    assert [check.status for check in result.engines] == ["passed", "passed"]
    for check in result.engines:
        assert (check.precision, check.limit) == ("fp16", LIMITS["fp16"][0])
        # PyTorch computes in float32: the rounding to 11 bits must show
        assert all((c.error.rel_l2 or 0) > 1e-5 for c in check.comparisons if c.against == "torch")
    compared = [(layer.member, layer.compared.rpartition(" ")[2]) for layer in result.layers]
    assert compared == [("small", "ONNX"), ("small", "float32"), ("large", "ONNX"), ("large", "float32")]
    for layer in result.layers:
        assert layer.first is None
        assert layer.tensors > 20


def test_a_bfloat16_engine_is_compared_with_its_widened_graph(tiny_pair: TinyPair, tmp_path: Path) -> None:
    members = {"small": tiny_pair.checkpoint("small")}
    output = tmp_path / "bf16.bundle"
    build(tiny_pair.recipe("small"), members=members, output=output, backend="torch", precision="bf16")
    (check,) = verify(output, samples=1).engines
    assert check.status == "passed"
    errors = [c.error.rel_l2 or 0 for c in check.comparisons]
    assert 1e-3 < max(errors) < 3e-2  # 8 bits


# --- what fails


def alter(bundle: Path, name: str) -> int:
    """Compiles another engine for a member, from weights of which one was changed, and states its hash in the manifest.

    Returns the position, from 1 on, of the node that reads the changed weights.
    """
    opened = open_bundle(bundle)
    member = opened.manifest.members[name]
    record = member.engines[0]
    model = onnx.load(opened.path(member.onnx[0]))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [
        (position, weights[node.input[1]])
        for position, node in enumerate(model.graph.node, start=1)
        if node.op_type == "MatMul" and node.input[1] in weights
    ]
    position, tensor = products[len(products) // 2]
    values = onnx.numpy_helper.to_array(tensor) * np.float32(1.2)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    changed = bundle.parent / "changed.onnx"
    onnx.save(model, changed)
    engine = opened.path(record.files[0])
    engine.unlink()
    open_backend("onnxruntime").compile(
        member=member,
        model=changed,
        profile=record.identity.profile,
        device="cpu",
        options={},
        output=engine,
        progress=silent,
    )
    sha256, size = hash_file(engine)
    edit(bundle, lambda members: members[name]["engines"][0]["files"][0].update(sha256=sha256, bytes=size))
    return position


def test_an_engine_of_other_weights_fails_though_every_hash_is_right(run: Command, copy: Path) -> None:
    position = alter(copy, "large")
    open_bundle(copy, verify="full")
    outcome = run("verify", copy, "--layers", "--samples", 1, "--json")
    assert outcome.code == 1
    assert "1 of 2 engines failed: the onnxruntime engine of member 'large'" in outcome.err
    again = f"tstitch-trt build {copy} --backend onnxruntime --device cpu --fresh"
    assert f"hint: compile them again: {again}" in outcome.err
    small, large = outcome.json["engines"]
    assert (small["status"], large["status"]) == ("passed", "failed")
    assert "model_output differs" in large["reason"]
    assert "allowed is 1e-04" in large["reason"]
    assert not any(c["passed"] for c in large["comparisons"])
    first = {layer["member"]: layer["first"] for layer in outcome.json["layers"]}
    assert first["small"] is None
    # the product itself may be fused away; what it goes into is at most a bias and a reshape later
    assert 0 <= first["large"]["position"] - position <= 3
    # what the hint says mends it, and nothing less would: every hash is right
    assert run(*again.replace(" --fresh", "").split()[1:]).code == 0
    assert run("verify", copy, "--samples", 1).code == 1
    assert run(*again.split()[1:]).code == 0
    assert run("verify", copy, "--samples", 1).code == 0


def test_the_text_names_the_engine_and_the_first_layer(run: Command, copy: Path) -> None:
    alter(copy, "small")
    outcome = run("verify", copy, "--members", "small", "--layers", "--samples", 1)
    assert outcome.code == 1
    assert "member small: onnxruntime" in outcome.out
    assert "FAILED" in outcome.out
    assert "first that differs: " in outcome.out
    assert "member large" not in outcome.out


def test_an_engine_that_the_manifest_describes_wrongly_fails(run: Command, copy: Path) -> None:
    edit(copy, lambda members: members["small"]["engines"][0]["identity"].update(onnx_sha256="0" * 64))
    outcome = run("verify", copy, "--samples", 1, "--json")
    assert outcome.code == 1
    small, large = outcome.json["engines"]
    assert (small["status"], large["status"]) == ("failed", "passed")
    assert "onnx_sha256" in small["reason"]


def test_a_file_that_is_no_engine_fails(run: Command, copy: Path) -> None:
    opened = open_bundle(copy)
    opened.path(opened.manifest.members["large"].engines[0].files[0]).write_bytes(b"x" * 100)
    sha256, size = hash_file(opened.path(opened.manifest.members["large"].engines[0].files[0]))
    edit(copy, lambda members: members["large"]["engines"][0]["files"][0].update(sha256=sha256, bytes=size))
    outcome = run("verify", copy, "--samples", 1, "--json")
    assert outcome.code == 1
    assert [e["status"] for e in outcome.json["engines"]] == ["passed", "failed"]
    assert "can't load the engine" in outcome.json["engines"][1]["reason"]


def test_a_failure_says_what_the_backend_would_doubt(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "doubt", lambda backend, identity: f"{identity.backend} may be at fault")
    alter(copy, "small")
    bundle = open_bundle(copy)
    (record,) = bundle.manifest.members["small"].engines
    with closing(References(bundle, 1, 0, 1, copy, {})) as references:
        check = check_engine(
            *(bundle, "small", record, lambda: references), gpu="cpu", threads=1, trusted=True, tick=lambda text: None
        )
    assert check.status == "failed"
    assert check.reason is not None
    assert check.reason.endswith("comparisons failed); onnxruntime may be at fault")


def test_members_that_give_nan_are_failed_work(run: Command, tiny_pair: TinyPair) -> None:
    outcome = run("verify", tiny_pair.broken_large())
    assert outcome.code == 1
    assert "NaN or infinity" in outcome.err
    assert "'large'" in outcome.err
    assert "hint: " in outcome.err


# --- what can't be checked here


def test_an_engine_of_another_version_is_not_checked_and_not_passed(run: Command, copy: Path) -> None:
    def older(members: Any) -> None:
        for member in members.values():
            member["engines"][0]["identity"]["backend_version"] = "0.0.1"

    edit(copy, older)
    outcome = run("verify", copy)
    assert outcome.code == 0
    assert outcome.out.count("not checked") == 2
    assert "backend_version is 0.0.1" in outcome.out
    assert "passed" not in outcome.out
    assert "no engine was run" in outcome.err


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed")
def test_a_tensorrt_rtx_plan_is_not_checked_without_a_gpu_but_its_header_is(
    run: Command, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_pair.alone("small"), tmp_path / "both.bundle"))
    members = {"small": tiny_pair.checkpoint("small")}
    options = {"compute-capabilities": "8.9"}
    build(tiny_pair.recipe("small"), members=members, output=bundle, backend="tensorrt-rtx", options=options)
    said = verify(bundle, samples=1)
    plan = next(check for check in said.engines if check.backend == "tensorrt-rtx")
    if plan.status == "not checked":  # else there is a GPU that can run it
        assert plan.reason
        assert plan.comparisons == ()
    assert plan.plan is not None
    assert plan.plan.endswith("compute capability 8.9")
    assert next(check for check in said.engines if check.backend == "onnxruntime").status == "passed"

    def edit_plan(field: str, value: str) -> None:
        def change(members: Any) -> None:
            records = members["small"]["engines"]
            next(r for r in records if r["identity"]["backend"] == "tensorrt-rtx")["identity"][field] = value

        edit(bundle, change)

    edit_plan("arch", "sm_120")
    outcome = run("verify", bundle, "--backend", "tensorrt-rtx")
    assert outcome.code == 1
    assert "the plan is for sm_89, the manifest says sm_120" in outcome.err
    edit_plan("arch", "sm_89")
    edit_plan("backend_version", "1.0.0.1")
    outcome = run("verify", bundle, "--backend", "tensorrt-rtx")
    assert outcome.code == 1
    assert "1.0.0.1" in outcome.err


def test_a_member_without_a_module_is_compared_with_onnx_runtime_alone(copy: Path) -> None:
    edit(copy, lambda members: members["small"].update(family="unet"))
    result = verify(copy, members=["small"], samples=1)
    assert result.engines[0].status == "passed"
    assert {c.against for c in result.engines[0].comparisons} == {"onnxruntime"}
    assert "no PyTorch module can be made for member 'small'" in result.references["torch"]


@pytest.fixture(scope="module")
def diffusers(tiny_pair: TinyPair) -> tuple[Path, Path]:
    """A bundle of one member in the diffusers layout, and its folder."""
    folder = tiny_pair.folder / "DiT"
    diffusers_folder(folder)
    recipe = tiny_pair.folder / "diffusers.toml"
    text = tiny_pair.recipe("small", classes=5).read_text()
    recipe.write_text(text.replace("options = { num_heads = 2 }\n", ""))
    output = tiny_pair.folder / "diffusers.bundle"
    build(recipe, members={"small": folder}, output=output, profile=Range(1, 2, 4))
    return output, folder


def test_a_diffusers_member_is_compared_with_pytorch_on_its_checkpoint(
    run: Command, diffusers: tuple[Path, Path]
) -> None:
    bundle, folder = diffusers
    alone = verify(bundle, samples=1)
    assert {c.against for c in alone.engines[0].comparisons} == {"onnxruntime"}
    assert "--member small=CHECKPOINT" in alone.references["torch"]
    said = run("verify", bundle, "--samples", 1, "--member", f"small={folder}", "--json").json
    errors = [c["error"]["rel_l2"] for c in said["engines"][0]["comparisons"] if c["against"] == "torch"]
    assert len(errors) == 6
    assert 0 < max(errors) < 1e-5
    assert said["references"]["torch"] == torch.__version__


def test_another_checkpoint_than_the_recorded_one_is_refused(
    run: Command, diffusers: tuple[Path, Path], tmp_path: Path, tiny_pair: TinyPair
) -> None:
    bundle, folder = diffusers
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    diffusers_folder(other, layers=1)
    refused(run("verify", bundle, "--member", f"small={other}"), "is not what member 'small' was made from", "sha256")
    refused(run("verify", bundle, "--member", "small=no"), "no does not exist", "--member small=CHECKPOINT")
    refused(run("verify", bundle, "--member", f"smal={folder}"), "'smal'", "did you mean 'small'?")
    # one in the published layout does not state its heads: the manifest does
    said = verify(tiny_pair.alone("small"), samples=1, checkpoints={"small": tiny_pair.checkpoint("small")})
    assert {c.against for c in said.engines[0].comparisons} == {"onnxruntime", "torch"}
    assert said.engines[0].status == "passed"


def test_engines_for_gpus_are_left_out_on_the_cpu(run: Command, copy: Path) -> None:
    def for_gpu(members: Any) -> None:
        members["small"]["engines"][0]["identity"]["arch"] = "sm_90"

    edit(copy, for_gpu)
    small, large = run("verify", copy, "--device", "cpu", "--samples", 1, "--json").json["engines"]
    assert (small["status"], large["status"]) == ("not checked", "passed")
    assert "the device asked for is cpu" in small["reason"]
    refused(run("verify", copy, "--device", "gpu"), "'gpu'", "cpu, cuda, cuda:N")


# --- bad input

CASES = {
    "no bundle": ("verify nothing.bundle", "nothing.bundle", "does not exist", "tstitch-trt build"),
    "unknown backend": ("verify PAIR --backend onnx", "'onnx'", "onnxruntime, tensorrt", "did you mean"),
    "backend it has not": ("verify PAIR --backend torch", "no torch engine", "it has: onnxruntime", "--backend onnx"),
    "unknown member": ("verify PAIR --members small,larg", "'larg'", "known: small, large", "did you mean 'large'?"),
    "no member": ("verify PAIR --members ,", "no member", "known: small, large", "--members small"),
    "no samples": ("verify PAIR --samples 0", "--samples", "0", "x>=1"),
    "samples are no number": ("verify PAIR --samples many", "'many' is not a whole number\n"),
    "threads below zero": ("verify PAIR --threads -1", "-1", "x>=0"),
    "no such option": ("verify PAIR --layer-by-layer", "'--layer-by-layer'", "--layers"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_a_hint(run: Command, tiny_pair: TinyPair, case: str) -> None:
    line, *parts = CASES[case]
    refused(run(*(tiny_pair.bundle if word == "PAIR" else word for word in line.split())), *parts)


def test_a_truncated_file_is_named(run: Command, copy: Path) -> None:
    path = next(copy.rglob("*.ort.onnx"))
    path.write_bytes(path.read_bytes()[:-100])
    refused(run("verify", copy), path.name, "truncated", "tstitch-trt build")


# --- the parts


def test_recorded_inputs_are_those_of_the_trajectory_at_all_noise_levels(tiny_pair: TinyPair, tmp_path: Path) -> None:
    settings = {"steps": 8, "schedule": ["small"] * 4 + ["large"] * 4, "guidance": 1.5}
    want, levels = [], []
    with tstitch_trt.load(tiny_pair.bundle) as runtime:
        plan = runtime.plan(**settings)
        zero = runtime.sample(labels=[0, 1], seed=3, steps=8, schedule=settings["schedule"], guidance=1.5)
        before: Any = None
        for event in runtime.iterate(labels=[0, 1], seed=3, **settings):
            row = plan.rows[event.step - 1]
            if before is not None:
                want.append(np.concatenate([before * np.float32(row[ROW["C_IN"]])] * 2))
            levels.append(row[ROW["T"]])
            before = event.latents()
        np.testing.assert_array_equal(before, zero.latents)
    references = References(open_bundle(tiny_pair.bundle), samples=1, seed=3, threads=0, folder=tmp_path)
    (everything,) = references.trajectory("large", 32)  # 8 steps x 2 images x 2 halves
    references.close()
    np.testing.assert_array_equal(everything["timestep"], np.repeat(np.float32(levels), 4))
    np.testing.assert_array_equal(everything["labels"], [0, 1, 10, 10] * 8)
    np.testing.assert_allclose(everything["sample"][4:], np.concatenate(want), rtol=1e-4, atol=1e-5)
    assert len(np.unique(everything["timestep"])) == 8


def test_a_graph_equals_itself_in_every_layer(tiny_pair: TinyPair) -> None:
    opened = open_bundle(tiny_pair.bundle)
    path = opened.path(opened.manifest.members["small"].onnx[0])
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "sample": rng.standard_normal((2, 4, 8, 8), np.float32),
        "timestep": np.array([999, 3], np.float32),
        "labels": np.array([1, 10]),
    }
    check = first_difference("small", "itself", (path, feeds), (path, feeds), 0.0)
    assert check.first is None
    floats = [node for node in onnx.load(path).graph.node if node.op_type in ("MatMul", "Add", "Mul", "Softmax")]
    assert check.tensors >= len(floats)


@pytest.fixture
def values() -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(0)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, np.inf, -np.inf, 0.0, -0.0], np.float32)
    return np.concatenate([rng.standard_normal(1000).astype(np.float32) * 100, ties])


def test_bfloat16_is_rounded_as_pytorch_does(values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    want = torch.from_numpy(values).to(torch.bfloat16)
    bits = to_storage(values, "bfloat16")
    np.testing.assert_array_equal(bits, want.view(torch.uint16).numpy())
    np.testing.assert_array_equal(from_storage(bits, "bfloat16"), want.float().numpy())
    assert np.isnan(from_storage(to_storage(np.array([np.nan, -np.nan], np.float32), "bfloat16"), "bfloat16")).all()


def test_errors_are_what_numpy_says_and_nan_is_never_small() -> None:
    rng = np.random.default_rng(1)
    want, noise = rng.standard_normal(100), 1e-3 * rng.standard_normal(100)
    error = measure_error(want + noise, want)
    assert error.max_abs == pytest.approx(np.abs(noise).max())
    assert error.max_rel == pytest.approx(np.abs(noise).max() / np.abs(want).max())
    assert error.rel_l2 == pytest.approx(np.linalg.norm(noise) / np.linalg.norm(want))
    assert error.within(1e-2)
    assert not error.within(1e-4)
    bad = want.copy()
    bad[3] = np.nan
    assert not measure_error(bad, want).within(1e9)
    assert not measure_error(want, bad).within(1e9)
    assert not error.worse(measure_error(bad, want)).within(1e9)
    infinite = np.where(want > 2, np.inf, want)
    assert measure_error(infinite, infinite).max_abs == 0
    assert not measure_error(-infinite, infinite).within(1e-2)
    assert measure_error(np.zeros(3), np.zeros(3)).within(0)
    assert not measure_error(np.full(3, 1e-3), np.zeros(3)).within(1e-4)
