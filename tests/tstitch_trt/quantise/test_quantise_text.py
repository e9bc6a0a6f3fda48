"""Trajectories of text bundles to calibrate on: prompts by seed, pictures to paint into, and what is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.command import Command, refused
from support.hand_made import made_member, text_bundle
from support.hand_made_parts import World
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import TextInputs
from tstitch_engines.errors import BadInput, BadSchedule, Unavailable
from tstitch_engines.spec import Range
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.quantise.calibration_plan import plan_calibration
from tstitch_trt.quantise.trajectories import Trajectories
from tstitch_trt.request.synthetic import PROMPTS

SETTINGS: dict[str, Any] = {"steps": 4, "guidance": 3.0}
OPTIONS = PlanOptions(**SETTINGS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return World().bundle(tmp_path_factory.mktemp("whole"))


def test_every_seed_has_its_prompt(whole: Bundle, tmp_path: Path) -> None:
    prompts = ("a red fox", "blue sky", "a bear")
    walks = Trajectories(
        whole,
        options=PlanOptions(**SETTINGS),
        folder=tmp_path,
        threads=1,
        tick=lambda: None,
        names=["plain"],
        prompts=prompts,
    )
    rows = walks.record("plain", "plain", [4, 6])
    latents = walks.latents("plain", [4, 6], {})
    walks.close()
    with tstitch_trt.load(whole, threads=1) as runtime:
        drawn = runtime.sample(prompt=["blue sky", "a red fox"], seeds=[4, 6], schedule="plain", **SETTINGS)
        encoded = runtime._texts.encode(["text_encoder", "text_encoder_2"], ["blue sky", "a red fox", ""])
    np.testing.assert_allclose(latents, drawn.latents, rtol=1e-5, atol=1e-6)
    hidden = np.concatenate([states for states, _ in encoded.values()], axis=-1)
    np.testing.assert_allclose(rows["encoder_hidden_states"], np.tile(hidden[[0, 1, 2, 2]], (4, 1, 1)), rtol=1e-6)
    assert len(rows["timestep"]) == 4 * 2 * 2


def test_a_member_that_paints_is_given_a_picture(whole: Bundle, tmp_path: Path) -> None:
    walks = Trajectories(
        whole,
        options=PlanOptions(**SETTINGS),
        folder=tmp_path,
        threads=1,
        tick=lambda: None,
        names=["painter"],
        prompts=PROMPTS[:1],
    )
    rows = walks.record("painter", "painter", [0, 1])
    walks.close()
    mask = rows["inpaint"][:, 0]
    assert (mask[:, :, :4] == 1).all()
    assert (mask[:, :, 4:] == 0).all()
    assert np.abs(rows["inpaint"][:, 1:]).max() > 0


def test_what_is_walked_is_decided_first(whole: Bundle, tiny_pair: TinyPair) -> None:
    def plan(bundle: Bundle, name: str, *schedules: str, **more: Any) -> Any:
        return plan_calibration(bundle.manifest, name, schedules, SETTINGS, samples=10, seed=0, **more)

    made = plan(whole, "plain")
    assert made.prompts == PROMPTS
    assert (made.schedules, made.names) == (("plain", "plain:0.5,steered"), ("plain", "steered"))
    assert plan(whole, "plain", "plain:0.5,painter", prompts=["a fox"]).names == ("plain", "painter")
    assert not set(made.seeds) & set(made.held_out)
    with pytest.raises(BadSchedule, match="member 'plain' runs at none"):
        plan(whole, "plain", "painter")
    with pytest.raises(BadInput, match="prompt 2 of 2 is empty"):
        plan(whole, "plain", prompts=["a fox", " "])
    pair = tstitch_trt.load(tiny_pair.bundle).bundle
    with pytest.raises(BadInput, match="draws classes"):
        plan(pair, "large", prompts=["a fox"])
    assert plan(pair, "large").prompts == ()


@pytest.mark.parametrize("missing", ["text encoder", "vae_encoder"])
def test_what_can_not_be_walked_is_refused(tmp_path: Path, missing: str) -> None:
    inputs: dict[str, tuple[int | str, ...]] = {"encoder_hidden_states": ("T", 9)}
    paints = missing == "vae_encoder"
    text = None if paints else TextInputs(hidden=(), width=9)
    more: dict[str, tuple[int | str, ...]] = {"inpaint": (5, "H", "W")} if paints else {}
    member = made_member("one", inputs={**inputs, **more}, text=text, inpaints=paints)
    bundle = text_bundle(tmp_path / "bare.bundle", {"one": member}, tokens=Range(2, 5, 7))
    with pytest.raises(Unavailable, match=f"has no {missing}") as caught:
        plan_calibration(bundle.manifest, "one", ["one"], SETTINGS, samples=10, seed=0)
    assert "whole pipeline folder" in caught.value.hint


def test_a_file_of_prompts(tmp_path: Path, tiny_pair: TinyPair, capfd: pytest.CaptureFixture[str]) -> None:
    if find_spec("modelopt") is None:
        pytest.skip("nvidia-modelopt is not installed")
    run = Command(capfd)
    asked = ("quantise", tiny_pair.bundle, "--member", "large", "--mode", "int8", "-o", tmp_path / "new.bundle")
    file = tmp_path / "prompts.txt"
    refused(run(*asked, "--prompts", file), "prompts.txt does not exist")
    file.write_text("\n \n")
    refused(run(*asked, "--prompts", file), "prompts.txt has no entry")
    file.write_bytes(b"\xff\xfe\xff")
    refused(run(*asked, "--prompts", file), "can't be read as text")
    file.write_text("a fox\n\na bear\n")
    refused(run(*asked, "--prompts", file, "--prompt", "a cat"), "3 prompts were given", "draws classes")
    assert not (tmp_path / "new.bundle").exists()
