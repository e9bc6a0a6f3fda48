"""A UNet distilled for a guidance scale and a plain one in one trajectory (T-Stitch on latent consistency models).

The oracle is a loop over diffusers' own modules, in which each UNet runs as its own pipeline would run it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.accelerating import LIMIT, SD, equal, fast, pipeline, seeded
from support.compare import relative_error
from support.tiny_families import unet_folder
from tstitch_engines.device.host_kernels import normal
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.pipeline.inputs import step_noise_seeds
from tstitch_trt.study.budget import Conditions
from tstitch_trt.study.calibrate.calibrate import calibrate
from tstitch_trt.study.store import save_study

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 4


class Pair:
    def __init__(self, sd: Path, cache: Path, cls: str, solver: str, small: Any, large: Any) -> None:
        self.pipe = pipeline(sd, solver, cls, unet=large)
        self.unets = (small, large)
        self.made = fast(self.pipe, sd, cache, small=small)

    def ours(self, scale: float, fraction: float | None, **more: Any) -> Any:
        asked = {"num_inference_steps": STEPS, "guidance_scale": scale, "fraction": fraction, "output_type": "latent"}
        return self.made(SD["prompt"], generator=seeded(1), **{**asked, **more}).images.numpy()

    def theirs(self, scale: float, early: int, *, halves: Sequence[float], negative: Any = None) -> Any:
        """``halves``: the classifier-free scale of each of the two UNets, of which a distilled one has no use."""
        import torch

        texts = self.pipe.encode_prompt(SD["prompt"], "cpu", 1, True, negative)
        schedule, generator = self.pipe.scheduler, seeded(1)
        x = torch.randn(2, 4, 8, 8, generator=generator)
        noise = step_noise_seeds(generator, 2)
        schedule.set_timesteps(STEPS)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            for step, t in enumerate(schedule.timesteps):
                own = np.stack([normal(seed, step, 256).reshape(4, 8, 8) for seed in noise])
                patch.setattr(
                    "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, own=own, **__: torch.from_numpy(own)
                )
                unet, g = self.unets[step >= early], halves[step >= early]
                seen = schedule.scale_model_input(x, t)
                if width := unet.config.time_cond_proj_dim:
                    w = torch.tensor([scale - 1.0, scale - 1.0])
                    told = self.pipe.get_guidance_scale_embedding(w, embedding_dim=width)
                    out = unet(seen, t, texts[0], timestep_cond=told).sample
                else:
                    out = unet(seen, t, texts[0]).sample
                    if g > 1:
                        null = unet(seen, t, texts[1]).sample
                        out = null + g * (out - null)
                x = schedule.step(out, t, x, return_dict=False)[0]
        return x.numpy()


def unets(sd: Path) -> tuple[Any, Any]:
    """A plain and a distilled one."""
    from diffusers import UNet2DConditionModel

    folder = sd.parent / "distilled for guidance"
    if not folder.exists():
        unet_folder(folder, "least", part=None, seed=9, time_cond_proj_dim=16)
    return tuple(UNet2DConditionModel.from_pretrained(path) for path in (sd / "small", folder))


@pytest.fixture(scope="module")
def plain_first(sd: Path, cache: Path) -> Iterator[Pair]:
    pair = Pair(sd, cache, "StableDiffusionPipeline", "ddim", *unets(sd))
    with pair.made:
        yield pair


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 6.0])
def test_a_plain_small_and_a_distilled_large_one(plain_first: Pair, scale: float) -> None:
    """At or below 1 the plain one is not guided, as in its own pipeline."""
    for early in (0, 2, 4):
        want = plain_first.theirs(scale, early, halves=(scale, 1.0))
        assert relative_error(plain_first.ours(scale, early / STEPS), want) < LIMIT


def test_at_the_ends_the_pair_is_either_pipeline(plain_first: Pair, sd: Path) -> None:
    """With a negative prompt, which only the plain one reads; a rescale too."""
    asked = {"num_inference_steps": STEPS, "guidance_scale": 6.0, "guidance_rescale": 0.6}
    equal(plain_first.pipe, plain_first.made, fraction=0.0, **asked)
    small = pipeline(sd, "ddim", unet=plain_first.unets[0])
    equal(small, plain_first.made, fraction=1.0, **asked)


def test_what_only_a_second_half_reads_is_said_to_be_unread(plain_first: Pair, caplog: Any) -> None:
    plain_first.ours(6.0, 0.0, negative_prompt=SD["negative_prompt"])
    assert "negative_prompt has no effect: none of these steps" in caplog.text


def test_each_member_may_be_given_a_scale(plain_first: Pair) -> None:
    want = plain_first.theirs(6.0, 2, halves=(3.0, 1.0), negative=SD["negative_prompt"])
    asked = {"negative_prompt": SD["negative_prompt"]}
    for got in (
        plain_first.ours(6.0, 0.5, guidance={"small": 3.0}, **asked),
        plain_first.ours(6.0, None, schedule="small:2:g=3,large", **asked),
    ):
        assert relative_error(got, want) < LIMIT
    with pytest.raises(BadInput, match="guidance is"):
        plain_first.ours(6.0, 0.5, guidance=0)
    with pytest.raises(UnknownName, match="unknown member 'smal'"):
        plain_first.ours(6.0, 0.5, guidance={"smal": 3.0})
    with pytest.raises(BadInput, match="guidance of 'small' is 'x'"):
        plain_first.ours(6.0, 0.5, guidance={"small": "x"})


@pytest.mark.slow
def test_a_budget_may_choose_the_distilled_one_alone(plain_first: Pair) -> None:
    """It reads no negative prompt; the plain one does."""
    runtime = plain_first.made.runtime
    found = calibrate(runtime, batches=[2], repeats=1, checks=1)
    assert {(cost.member, cost.guided) for cost in found.steps} == {("small", False), ("small", True), ("large", False)}
    save_study(runtime.bundle, found, key=Conditions.of(found).key)
    asked = {"negative_prompt": SD["negative_prompt"], "guidance_rescale": 0.5}
    for scale in (0.5, 6.0):
        for guidance in (None, {"small": 3.0}):
            got = plain_first.ours(scale, None, latency_budget_ms=1e9, guidance=guidance, **asked)
            np.testing.assert_array_equal(got, plain_first.ours(scale, 0.0, guidance=guidance, **asked))


def test_in_the_pipeline_of_latent_consistency_models(sd: Path, cache: Path) -> None:
    """It has no second half and no negative prompt: the plain one is not guided, unless it is given a scale."""
    pair = Pair(sd, cache, "LatentConsistencyModelPipeline", "lcm", *unets(sd))
    with pair.made:
        got = pair.ours(8.5, 0.5)
        assert relative_error(got, pair.theirs(8.5, 2, halves=(1.0, 1.0))) < LIMIT
        own = pair.ours(8.5, 0.5, guidance={"small": 7.5})
        assert relative_error(own, pair.theirs(8.5, 2, halves=(7.5, 1.0))) < LIMIT
        assert relative_error(own, got) > 10 * LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 6.0])
def test_a_distilled_small_and_a_plain_large_one(sd: Path, cache: Path, scale: float) -> None:
    plain, distilled = unets(sd)
    pair = Pair(sd, cache, "StableDiffusionPipeline", "ddim", distilled, plain)
    with pair.made:
        for early in (0, 2, 4):
            want = pair.theirs(scale, early, halves=(1.0, scale))
            assert relative_error(pair.ours(scale, early / STEPS), want) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 6.0])
def test_of_sdxl(xl: Path, cache: Path, scale: float) -> None:
    """LCM-SDXL and SSD-1B: at both ends the pair is the pipeline of either."""
    from diffusers import UNet2DConditionModel

    folder = xl.parent / "distilled xl"
    if not folder.exists():
        unet_folder(folder, "sdxl", part=None, seed=9, time_cond_proj_dim=16)
    large, small = (UNet2DConditionModel.from_pretrained(path) for path in (folder, xl / "small"))
    pipes = [pipeline(xl, "euler", "StableDiffusionXLPipeline", unet=unet) for unet in (large, small)]
    with fast(pipes[0], xl, cache) as made:
        for fraction, pipe in enumerate(pipes):
            equal(pipe, made, fraction=float(fraction), guidance_scale=scale, height=64, width=64)
