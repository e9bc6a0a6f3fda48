"""Whole bundles of tiny text members: precisions, pruned with full, three members, parts; what is made only once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.compare import relative_error
from support.tiny_checkpoints import MEMBER, PNDM, pieces, text_recipe
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_trt import Runtime

PROMPT = "an astronaut riding a horse"


class Trio:
    """The same UNet as ``small`` in float32 and as ``large`` in float16, and a pruned one as ``base``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        more = f"[other_members]\n{MEMBER.format(family='unet-sd')}"
        self.recipe = text_recipe(folder / "trio.toml", halves=("decoder",), more=more)
        self.full = pieces(
            folder / "full",
            "one",
            text=32,
            vae={"levels": 2, "scaling_factor": 0.18215},
            scheduler=PNDM,
        )
        self.pruned = pieces(folder / "pruned", "least", seed=5)
        self.bundle = folder / "trio.bundle"
        self.manifest = self.build(self.bundle)

    def build(self, output: Path, **changes: Any) -> Manifest:
        members = {"small": self.full, "large": self.full, "base": self.pruned}
        given = {"members": members, "precision": {"large": "fp16"}, "profile": Range(1, 2, 2)}
        return build(self.recipe, output=output, **{**given, **changes})


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return Trio(tmp_path_factory.mktemp("trio"))


@pytest.fixture(scope="module")
def runtime(trio: Trio) -> Runtime:
    return tstitch_trt.load(trio.bundle)


def drawn(runtime: Runtime, schedule: str, **changes: Any) -> Any:
    asked: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "ugly", "seed": 3, "steps": 10, "solver": "ddim"}
    found = runtime.sample(**{**asked, **changes}, guidance=4.0, schedule=schedule, decode=False)
    return found.latents


def test_manifest(trio: Trio) -> None:
    manifest = trio.manifest
    assert {name: member.precision for name, member in manifest.members.items()} == {
        "small": "fp32", "large": "fp16", "base": "fp32",
    }  # fmt: skip
    assert list(manifest.parts) == ["text_encoder", "vae_decoder"]
    assert {part.precision for part in manifest.parts.values()} == {"fp32"}
    assert "tokenizer" in manifest.parts["text_encoder"].files
    assert (manifest.decoder.kind, manifest.decoder.factor) == ("vae", 2)
    assert manifest.members["small"].multiples == {}
    assert manifest.defaults.solver == "pndm"
    assert manifest.notes == open_bundle(trio.bundle).manifest.notes
    words = open_bundle(trio.bundle).rebuild_command
    assert "--member small=full --member large=full --member base=pruned --precision large=fp16" in words
    assert "--part" not in words, "they are in the pipeline that large is given as"
    assert str(trio.folder) not in (trio.bundle / "manifest.json").read_text(), "no path of the build machine"


def test_one_model_at_two_precisions(runtime: Runtime) -> None:
    """The text encoder in float32 serves both."""
    full, half = drawn(runtime, "small"), drawn(runtime, "large")
    assert 0 < relative_error(half, full) < 1e-2
    assert 0 < relative_error(drawn(runtime, "small:0.5,large"), full) < 1e-2


def test_pruned_with_full_and_three_members(runtime: Runtime) -> None:
    full, pruned = drawn(runtime, "small"), drawn(runtime, "base")
    assert relative_error(pruned, full) > 1e-2
    two, three = drawn(runtime, "base:0.4,small"), drawn(runtime, "base:0.4,small:0.3,large")
    assert min(relative_error(two, full), relative_error(two, pruned)) > 1e-3
    assert 0 < relative_error(three, two) < 1e-2, "float16 in the last steps alone"


def test_embeddings_in_place_of_prompts(runtime: Runtime, trio: Trio) -> None:
    """Those of the text encoder in transformers."""
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer: Any = CLIPTokenizer.from_pretrained(trio.full / "tokenizer")
    ids = tokenizer([PROMPT, "ugly"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        encoded = CLIPTextModel.from_pretrained(trio.full / "text_encoder")(ids).last_hidden_state.numpy()
    given = {"prompt_embeds": encoded[:1], "negative_prompt_embeds": encoded[1:]}
    got = drawn(runtime, "base:0.4,small:0.3,large", prompt=None, negative_prompt=None, **given)
    assert relative_error(got, drawn(runtime, "base:0.4,small:0.3,large")) < 1e-4


def test_pictures(runtime: Runtime) -> None:
    images = runtime.sample(prompt=PROMPT, seed=1, steps=2, schedule="large").images
    assert images is not None
    assert images.shape == (1, 16, 16, 3)
    assert images.dtype == np.uint8


# --- what is made once


def said(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


def test_a_second_build_exports_nothing(trio: Trio, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO):
        assert trio.build(trio.bundle) == trio.manifest
    assert not said(caplog, ": building")
    assert len(said(caplog, "reused from the bundle")) == 5
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = trio.build(tmp_path / "other.bundle")
    assert again == trio.manifest
    assert not said(caplog, ": building")
    assert len(said(caplog, "reused from the cache")) == 10, "an export and an engine for each of the five networks"


@pytest.mark.slow
def test_an_interrupted_build_goes_on_where_it_stopped(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    recipe = text_recipe(tmp_path / "one.toml", members=("small",))
    pipeline = pieces(tmp_path / "pipeline", "least", text=32)
    before = {path.name for path in tmp_path.iterdir()}

    def make(**more: Any) -> Manifest:
        return build(
            recipe, members={"small": pipeline}, output=tmp_path / "one.bundle", profile=Range(1, 2, 2), **more
        )

    def interrupted(phase: str, share: float) -> None:
        if phase.startswith("text_encoder: compile"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(progress=interrupted)
    assert {path.name for path in tmp_path.iterdir()} == before | {"cache"}, "nothing is left of the bundle"
    with caplog.at_level(logging.INFO):
        manifest = make()
    assert said(caplog, ": building") == ["part text_encoder: onnxruntime engine: building"], "the rest was there"
    assert list(manifest.parts) == ["text_encoder"]


def test_notes_are_logged_while_it_builds(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trio.build(trio.bundle)
    assert trio.manifest.notes
    for note in trio.manifest.notes:
        assert said(caplog, note)


def test_another_part_is_exported_alone(trio: Trio, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    from support.tiny_families import vae_folder

    vae_folder(tmp_path / "tiny", "tiny", levels=2)
    with caplog.at_level(logging.INFO):
        manifest = trio.build(tmp_path / "out.bundle", parts={"vae_decoder": tmp_path / "tiny"})
    built = {line.partition(":")[0] for line in said(caplog, ": building")}
    assert built <= {"part vae_decoder"}, "the rest was there, and in a kept cache that too"
    assert manifest.parts["vae_decoder"].config["kind"] == "tiny"
    assert "--part vae_decoder=tiny" in open_bundle(tmp_path / "out.bundle").rebuild_command
    with tstitch_trt.load(tmp_path / "out.bundle") as other:
        assert other.sample(prompt=PROMPT, steps=2).images is not None
