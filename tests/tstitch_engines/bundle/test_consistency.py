"""Manifests out of their ranges, or that contradict themselves, are not opened and not put in place of good ones."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.hostile import altered, altered_bytes, dumps, only_our_errors
from support.manifests import manifest, member
from tstitch_engines.bundle.bundle import MANIFEST, open_bundle, write_bundle
from tstitch_engines.bundle.files import copy_component
from tstitch_engines.bundle.manifest import (
    Decoder,
    Defaults,
    EngineIdentity,
    EngineRecord,
    ExportCheck,
    Latent,
    Manifest,
    Network,
    NoiseScheduleSpec,
    Quality,
    Quantisation,
    QuantisationLoss,
    Source,
    TextInputs,
)
from tstitch_engines.errors import BadBundle, BadInput, BuildFailed
from tstitch_engines.spec import Range, ShapeProfile, TensorSpec
from tstitch_trt.cli.inspect import _document, _layers, _print
from tstitch_trt.plan.plan import make_plan

Json = dict[str, Any]


def full(staging: Path) -> Manifest:
    """A manifest with every record that there is; all its files are one."""
    (staging.parent / "source").write_bytes(b"\x08\x08\x3a\x00")  # ir_version = 8 and an empty graph
    part = copy_component(staging.parent / "source", staging, "small/model.onnx")
    identity = EngineIdentity(
        schema=1,
        backend="onnxruntime",
        backend_version="1.2",
        onnx_sha256=part.sha256,
        precision="fp32",
        profile=ShapeProfile({"B": Range(1, 2, 4)}),
        arch="x86",
        options={"level": 3, "fast": True},
    )
    loss = QuantisationLoss(timesteps=(900.0, 10.0), rows=4, rel_l2=0.1, cosine=0.9, max_abs=2.0)
    quantised = Quantisation(
        method="max", high_precision="fp16", source_precision="fp32", source_sha256=part.sha256, layers=("a", "b"),
        kept=("c",), rows=8, seed=1, steps=10, solver="ddim", guidance=2.0, schedules=("small",), timesteps=(9.0, 1.0),
        loss=(loss,), latents=(0.1,), latents_seeds=(1,), latents_schedule="small", prompts=("a fox",),
    )  # fmt: skip
    small = msgspec.structs.replace(
        member(),
        inputs=(*member().inputs, TensorSpec(name="encoder_hidden_states", dtype="float32", shape=("B", 7, 8))),
        onnx=(part,),
        sources=(Source(name="small.pt", sha256=part.sha256, bytes=5),),
        check=ExportCheck(max_abs=0.1, rel_l2=0.1, batches=(1, 2), against="torch 2"),
        config={"depth": 2, "name": "x", "rate": 0.5},
        engines=(EngineRecord(files=(part,), identity=identity),),
        files={"weights": part},
        noise=NoiseScheduleSpec(kind="linear", beta_end=0.019),
        quantisation=quantised,
        text=TextInputs(hidden=("text_encoder",), width=8),
    )
    encoder = msgspec.convert(
        {
            "family": "clip-text",
            "precision": "fp32",
            "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["B", 77]}],
            "outputs": [{"name": "hidden", "dtype": "float32", "shape": ["B", "2*T", 8]}],
            "onnx": (),
            "sources": (),
            "check": None,
            "config": {},
            "multiples": {"T": 8},
        },
        Network,
    )
    return manifest(
        {"small": small, "large": member(parametrisation="v")},
        parts={"text_encoder": encoder},
        versions={"onnx": "1.2"},
        quality=Quality(network=part, reference=part),
        notes=("there is no vae_decoder",),
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("full") / "a.bundle"
    write_bundle(output, full)
    return output


def put(bundle: Path, change: Callable[[Json], object]) -> Path:
    """A copy of the manifest beside the same files, changed."""
    data = json.loads((bundle / MANIFEST).read_bytes())
    change(data)
    return put_bytes(bundle, dumps(data))


def put_bytes(bundle: Path, content: bytes) -> Path:
    copy = bundle.parent / "hostile.bundle"
    copy.mkdir(exist_ok=True)
    (copy / MANIFEST).write_bytes(content)
    if not (copy / "small").exists():
        shutil.copytree(bundle / "small", copy / "small")
    return copy


def use(bundle: Path) -> None:
    opened = open_bundle(bundle, "size")
    only_our_errors(lambda: _document(opened, {}))
    only_our_errors(lambda: _layers(opened))
    only_our_errors(lambda: _print(opened))
    make_plan(opened.manifest)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d["latent"].update(channels=0), "'latent.channels' is 0; allowed is from 1 to 4096"),
        (lambda d: d["latent"].update(height=10**9), "'latent.height' is 1000000000"),
        (lambda d: d["latent"].update(scaling=0), "'latent.scaling' is 0"),
        (lambda d: d["latent"].update(scaling=float("nan")), "NaN"),
        (lambda d: d["latent"].update(shift=1e300), "'latent.shift' is 1e+300"),
        (lambda d: d["noise"].update(steps=10**9), "'noise.steps' is 1000000000; allowed is from 1 to 100000"),
        (lambda d: d["noise"].update(beta_start=0), "'noise.beta_start' is 0; allowed is above 0 below 1"),
        (lambda d: d["noise"].update(beta_end=5), "'noise.beta_end' is 5"),
        (lambda d: d["noise"].update(beta_start=0.5, beta_end=0.1), "noise has 1000 steps and beta 0.5 to 0.1"),
        (lambda d: d["conditioning"].update(classes=-1), "'conditioning.classes' is -1"),
        (lambda d: d["conditioning"].update(null=11), "conditioning.null is 11; allowed is 0 to 10"),
        (lambda d: d["conditioning"].update(names=["a"]), "names 1 classes of 10"),
        (lambda d: d["conditioning"].update(kind="text"), "conditioning of kind 'text' with 10 classes"),
        (lambda d: d["defaults"].update(steps=0), "'defaults.steps' is 0"),
        (lambda d: d["defaults"].update(guidance=1e39), "'defaults.guidance' is 1e+39"),
        (lambda d: d["defaults"].update(guided_channels=5), "guided_channels is 5; allowed is 1 to 4"),
        (lambda d: d["defaults"].update(schedule="small:0.5,huge"), "'small:0.5,huge'; the members are small, large"),
        (lambda d: d["defaults"].update(schedule="a" * 30_000), "'defaults.schedule' has 30,000 letters"),
        (lambda d: d["decoder"].update(factor=0), "'decoder.factor' is 0"),
        (lambda d: d["decoder"].update(kind="vae"), "decoder.kind is 'vae', and there is no part vae_decoder"),
        (lambda d: d.update(name="a\x1b]0;owned\x07"), "'name' is 'a\\x1b]0;owned\\x07'"),
        (lambda d: d.update(members={}), "'members' has 0 entries"),
        (lambda d: d["members"].update({"../x": d["members"].pop("small")}), "a name in members' is '../x'"),
        (lambda d: d["members"].update(text_encoder=d["members"]["small"]), "'text_encoder' is a member and a part"),
        (lambda d: d["members"]["small"]["inputs"].pop(0), "member 'small' has no input sample"),
        (lambda d: d["members"]["small"]["inputs"].append(d["members"]["small"]["inputs"][0]), "two inputs of member"),
        (
            lambda d: d["members"]["small"]["inputs"][0].update(shape=["B", 3, 8, 8]),
            "member 'small': sample float32[B, 3, 8, 8] is not of the latent's shape [B, 4, 8, 8]",
        ),
        (lambda d: d["members"]["small"]["inputs"][0].update(shape=["B", 4, 0, 8]), "inputs.0.shape.2' is 0"),
        (lambda d: d["members"]["small"]["inputs"][0].update(shape=["B", 4, "H/0", 8]), "the dimension 'H/0'"),
        (lambda d: d["members"]["small"]["inputs"][1].update(shape=[]), "timestep float32[] is not of the shape [B]"),
        (lambda d: d["members"]["small"]["inputs"][1].update(shape=["B", 2]), "is not of the shape [B]"),
        (lambda d: d["members"]["small"]["inputs"][2].update(shape=[1]), "labels int64[1] is not of the shape [B]"),
        (
            lambda d: d["members"]["small"]["inputs"][3].update(shape=["B", 7, 9]),
            "encoder_hidden_states float32[B, 7, 9] is not of the shape [B, any, 8]",
        ),
        (lambda d: d["members"]["small"]["inputs"].pop(), "no input encoder_hidden_states, and its text is TextInputs"),
        (lambda d: d["members"]["small"].update(inpaints=True), "no input inpaint, and its inpaints is True"),
        (lambda d: d["members"]["large"].update(guidance_embedding=2), "no input timestep_cond"),
        (lambda d: d["members"]["small"].update(outputs=[]), "'members.small.outputs' has 0 entries"),
        (lambda d: d["members"]["small"].update(latent_ratio=0), "'members.small.latent_ratio' is 0"),
        (lambda d: d["members"]["small"]["onnx"][0].update(bytes=-1), "'members.small.onnx.0.bytes' is -1"),
        (lambda d: d["members"]["small"]["onnx"][0].update(sha256="0"), "sha256' is '0'; allowed is 64 hex digits"),
        (lambda d: d["members"]["small"]["files"]["weights"].update(sha256="0" * 64), "named with two hashes"),
        (
            lambda d: d["members"]["small"]["engines"][0]["identity"]["profile"]["dims"]["B"].update(max=10**12),
            "dims.B.max' is 1000000000000",
        ),
        (lambda d: d["members"]["small"]["engines"][0]["identity"]["profile"].update(dims={}), "has no B"),
        (lambda d: d["members"]["small"]["engines"][0].update(files=[]), "engines.0.files' has 0 entries"),
        (lambda d: d["parts"]["text_encoder"].update(multiples={"Q": 2}), "names 'Q', which is no dimension"),
        (lambda d: d["members"]["small"]["quantisation"].update(latents=[1e300]), "latents.0' is 1e+300"),
        (lambda d: d.update(notes=["x"] * 2000), "'notes' has 2,000 entries"),
    ],
)  # fmt: skip
def test_lies_are_refused_by_name(change: Callable[[Json], object], problem: str, good: Path) -> None:
    with pytest.raises(BadBundle, match=re.escape(problem)) as caught:
        open_bundle(put(good, change), "size")
    assert MANIFEST in caught.value.message


def test_manifests_that_are_no_files(tmp_path: Path) -> None:
    for name in ("pipe", "loop", "folder"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / MANIFEST)
    (tmp_path / "loop" / MANIFEST).symlink_to(MANIFEST)
    (tmp_path / "folder" / MANIFEST).mkdir()
    for name, problem in (("pipe", "a pipe"), ("loop", "Too many levels"), ("folder", "a folder")):
        with pytest.raises(BadBundle, match=problem):
            open_bundle(tmp_path / name)


@pytest.mark.parametrize(
    "changes",
    [
        {"latent": Latent(channels=4, height=8, width=8, scaling=float("nan"))},
        {"latent": Latent(channels=4, height=8, width=8, scaling=0.0)},
        {"defaults": Defaults(guidance=float("inf"))},
        {"defaults": Defaults(schedule="huge")},
        {"decoder": Decoder(kind="vae")},
    ],
)
def test_what_can_t_be_opened_is_not_put_in_place(changes: Any, tmp_path: Path) -> None:
    output = tmp_path / "a.bundle"
    write_bundle(output, lambda staging: manifest(name="old"))
    with pytest.raises(BuildFailed, match="can't be opened and was not put there") as caught:
        write_bundle(output, lambda staging: manifest(name="new", **changes))
    assert "what was there before is unchanged" in caught.value.hint
    assert open_bundle(output).manifest.name == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bundle"]


def test_noise_is_checked_where_it_is_made() -> None:
    for changes in (
        {"beta_start": float("nan")},
        {"beta_start": 0.0},
        {"beta_end": 5.0},
        {"steps": 10**9},
        {"steps": 0},
    ):
        with pytest.raises(BadInput, match="noise has"):
            NoiseScheduleSpec(kind="linear", **changes)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_altered_manifests(data: st.DataObject, good: Path) -> None:
    changed = data.draw(altered(json.loads((good / MANIFEST).read_bytes())))
    only_our_errors(lambda: use(put_bytes(good, dumps(changed))))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_manifests(data: st.DataObject, good: Path) -> None:
    content = data.draw(altered_bytes((good / MANIFEST).read_bytes()))
    only_our_errors(lambda: use(put_bytes(good, content)))
