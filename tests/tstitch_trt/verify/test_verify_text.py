"""Verifying text bundles and their parts: on which inputs, at which sizes, and what is found when one is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import tstitch_trt
from support.command import Command, refused
from support.hand_made import Made, made_member, text_bundle
from support.hand_made_parts import World
from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import TextInputs
from tstitch_engines.errors import Unavailable
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range
from tstitch_trt.runtime.text_encoder import TokenLayout, open_tokenizer
from tstitch_trt.verify.references import References
from tstitch_trt.verify.verify import verify


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return World().bundle(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.root, tmp_path / "copy.bundle"))


def references(bundle: Bundle, folder: Path) -> References:
    return References(bundle, samples=1, seed=3, threads=1, folder=folder)


def test_every_engine_is_compared_on_random_and_recorded_inputs_at_several_sizes(run: Command, whole: Bundle) -> None:
    outcome = run("verify", whole.root, "--samples", 1, "--json")
    assert outcome.code == 0, outcome.err
    engines = {e["member"]: e for e in outcome.json["engines"]}
    assert list(engines) == list(whole.manifest.networks())
    for name, engine in engines.items():
        network = whole.manifest.networks()[name]
        assert (engine["status"], engine["kind"]) == ("passed", "part" if name in whole.manifest.parts else "member")
        found = {(c["inputs"], c["batch"], *sorted(c["sizes"].items())) for c in engine["comparisons"]}
        batches = {c["batch"] for c in engine["comparisons"]}
        profile = network.engines[0].identity.profile.dims
        assert batches == {profile["B"].min, profile["B"].opt, profile["B"].max}
        assert {kind for kind, *_ in found} == {"random", "trajectory"}
        if "H" in profile:
            heights = {(kind, size) for kind, _, *sizes in found for dim, size in sizes if dim == "H"}
            assert heights == {("random", 4), ("random", 8), ("random", 16), ("trajectory", 4), ("trajectory", 8)}
        assert {c["tensor"] for c in engine["comparisons"]} == {spec.name for spec in network.outputs}


def test_recorded_inputs_are_what_the_runtime_gives_each_network(whole: Bundle, tmp_path: Path) -> None:
    found = references(whole, tmp_path)
    tokenizer = open_tokenizer(whole.path(whole.manifest.parts["text_encoder"].files["tokenizer"]))
    layout = TokenLayout.of(whole.manifest.parts["text_encoder"])
    ids = tokenizer.encode("a red fox in the snow", add_special_tokens=False).ids
    (read,) = found.trajectory("text_encoder", 8)
    for row in layout.lay_out(ids, layout.chunks(len(ids))):
        assert (read["input_ids"] == row).all(axis=1).any()

    prompts = ["a red fox in the snow", "an oil painting of the sea"]
    with tstitch_trt.load(whole, threads=1) as runtime:
        drawn = runtime.sample(prompt=prompts, schedule="plain", steps=8, guidance=1.5, seed=3)
        hidden = runtime._texts.encode(["text_encoder", "text_encoder_2"], prompts)
    (latents,) = found.trajectory("vae_decoder", 2)
    np.testing.assert_allclose(latents["latent"], drawn.latents, rtol=1e-5, atol=1e-6)
    (pictures,) = found.trajectory("vae_encoder", 2)
    assert drawn.images is not None
    np.testing.assert_array_equal(
        np.rint((pictures["image"] + 1) * 127.5), drawn.images.transpose(0, 3, 1, 2).astype(np.float32)
    )
    (member,) = found.trajectory("plain", 32)  # 8 steps x 2 images x 2 halves
    text = np.concatenate([states for states, _ in hidden.values()], axis=-1)
    np.testing.assert_array_equal(member["encoder_hidden_states"][:2], text)
    assert len(np.unique(member["timestep"])) == 8
    (painted,) = found.trajectory("painter", 32)
    assert set(np.unique(painted["inpaint"][:, 0])) == {0, 1}
    assert len(np.unique(painted["timestep"])) == 8  # it ran alone, at every noise level
    (steered,) = found.trajectory("steered", 32)
    (control,) = found.trajectory("controlnet", 32)
    np.testing.assert_array_equal(control["sample"], steered["sample"])
    assert np.abs(steered["mid_residual"]).max() > 0
    assert 0 <= control["control"].min() < control["control"].max() <= 1
    assert found.notes.keys() == {"onnxruntime"}  # nothing is left out
    found.close()


def test_random_inputs_are_of_their_kind(whole: Bundle, tmp_path: Path) -> None:
    found = references(whole, tmp_path)
    (texts,) = found.random("text_encoder", {"B": 16})
    assert (texts["input_ids"][:, 0] == 0).all()
    assert (texts["input_ids"] == 1).any(axis=1).all()
    (control,) = found.random("controlnet", {"B": 2, "H": 4, "W": 6, "T": 6})
    assert control["control"].shape == (2, 3, 32, 48)
    assert 0 <= control["control"].min() < control["control"].max() <= 1
    (painted,) = found.random("painter", {"B": 2, "H": 4, "W": 6, "T": 6})
    assert set(np.unique(painted["inpaint"][:, 0])) == {0, 1}
    (again,) = found.random("painter", {"B": 2, "H": 4, "W": 6, "T": 6})
    np.testing.assert_array_equal(again["sample"], painted["sample"])
    found.close()


def spoil(root: Path, name: str) -> None:
    """Another engine in place of a part's, from weights that were scaled, its hash stated in the manifest."""
    bundle = open_bundle(root)
    part = bundle.manifest.parts[name]
    record = part.engines[0]
    model = onnx.load(bundle.path(part.onnx[0]))
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    values = onnx.numpy_helper.to_array(tensor) * np.float32(1.1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    changed = root.parent / "changed.onnx"
    onnx.save(model, changed)
    engine = bundle.path(record.files[0])
    engine.unlink()
    open_backend("onnxruntime").compile(
        member=part, model=changed, profile=record.identity.profile, device="cpu", options={}, output=engine,
        progress=silent,
    )  # fmt: skip
    sha256, size = hash_file(engine)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["parts"][name]["engines"][0]["files"][0].update(sha256=sha256, bytes=size)
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder", "controlnet"])
def test_a_wrong_part_is_named_with_its_first_wrong_layer(run: Command, copy: Path, name: str) -> None:
    spoil(copy, name)
    outcome = run("verify", copy, "--samples", 1, "--members", f"plain,{name}", "--layers")
    assert outcome.code == 1
    assert f"1 of 2 engines failed: the onnxruntime engine of part '{name}'" in outcome.err
    assert f"part {name}: onnxruntime" in outcome.out
    assert "first that differs: " in outcome.out.split(f"part {name}, its onnxruntime engine with its ONNX")[1]
    again = outcome.err.split("hint: compile them again: tstitch-trt ")[1].split()
    assert run(*again).code == 0
    assert run("verify", copy, "--samples", 1, "--members", name).code == 0


def test_parts_are_rebuilt_where_they_do_not_fit(run: Command, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["parts"]["vae_encoder"]["engines"][0]["identity"]["backend_version"] = "0.0.1"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (check,) = verify(copy, members=["vae_encoder"], samples=1).engines
    assert check.status == "not checked"
    bundle = open_bundle(copy)
    bundle.path(bundle.manifest.parts["text_encoder_2"].engines[0].files[0]).unlink()
    outcome = run("verify", copy, "--samples", 1, "--rebuild", "--json")
    assert outcome.code == 0, outcome.err
    assert {e["status"] for e in outcome.json["engines"]} == {"passed"}


def test_a_bundle_of_members_alone_is_walked_on_made_up_embeddings(tmp_path: Path) -> None:
    text = TextInputs(hidden=(), width=9)
    members = {name: made_member(name, inputs={"encoder_hidden_states": ("T", 9)}, text=text) for name in ("a", "b")}
    bundle = text_bundle(tmp_path / "bare.bundle", members, tokens=Range(2, 5, 7))
    result = verify(bundle, samples=1)
    for check in result.engines:
        assert check.status == "passed"
        assert {(c.sizes["H"], c.sizes["T"]) for c in check.comparisons if c.inputs == "trajectory"} == {(8, 5), (4, 5)}
        assert {c.sizes["T"] for c in check.comparisons if c.inputs == "random"} == {5, 2, 7}


def test_what_can_not_be_recorded_is_said_and_compared_on_random_inputs(tmp_path: Path) -> None:
    """A member that paints into pictures needs an encoder, and this bundle has none."""
    text = TextInputs(hidden=(), width=9)
    inputs: dict[str, tuple[int | str, ...]] = {"encoder_hidden_states": ("T", 9), "inpaint": (5, "H", "W")}
    members: dict[str, Made] = {"painter": made_member("painter", inputs=inputs, text=text, inpaints=True)}
    result = verify(text_bundle(tmp_path / "painter.bundle", members), samples=1)
    (check,) = result.engines
    assert check.status == "passed"
    assert {c.inputs for c in check.comparisons} == {"random"}
    assert "no picture encoder" in result.references["recorded inputs of painter"]


def test_unknown_names_list_members_and_parts(run: Command, whole: Bundle) -> None:
    refused(run("verify", whole.root, "--members", "vae_decode"), "'vae_decode'", "did you mean 'vae_decoder'?")
    refused(run("verify", whole.root, "--part", "clip=x"), "'clip'", "text_encoder")
    refused(run("verify", whole.root, "--part", "vae_decoder"), "--part 'vae_decoder' is not NAME=CHECKPOINT")


def test_a_part_without_a_module_names_its_own_option(whole: Bundle, tmp_path: Path) -> None:
    found = references(whole, tmp_path)
    with pytest.raises(Unavailable, match="for part 'vae_decoder'") as caught:
        found.torch("vae_decoder", {})
    assert "--part vae_decoder=CHECKPOINT" in caught.value.hint
    found.close()
