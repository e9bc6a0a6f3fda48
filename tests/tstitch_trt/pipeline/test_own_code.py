"""Subclasses, patches and state of pipelines and schedulers: taken as diffusers' own, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from support.tiny_pipelines import SCHEDULERS, scheduler
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.pipeline.kinds import kind_of
from tstitch_trt.pipeline.own_code import scheduler_class

# diffusers hands numpy its tensors in a way that newer versions of numpy warn of
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@cache
def classes() -> tuple[type, type]:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    return StableDiffusionPipeline, StableDiffusionXLPipeline


def pipeline(cls: type | None = None) -> Any:
    """Without components: only its code counts here."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    return (cls or classes()[0])(**parts, scheduler=scheduler("ddim"), requires_safety_checker=False)


# --- pipelines


def test_a_subclass_that_changes_no_picture_is_its_base() -> None:
    class Mine(classes()[0]):  # type: ignore[misc]
        """With helpers, and with what we call ourselves."""

        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.drawn = 0

        def draw_twice(self, prompt: str) -> Any:
            return [self(prompt), self(prompt)]

        def encode_prompt(self, prompt: Any, *args: Any, **keywords: Any) -> Any:
            return super().encode_prompt(f"{prompt}, oil painting", *args, **keywords)

    assert kind_of(pipeline(Mine)) is kind_of(pipeline())


@pytest.mark.parametrize(
    "name",
    ["__call__", "prepare_latents", "do_classifier_free_guidance", "prepare_extra_step_kwargs"],
)
def test_a_subclass_that_overrides_what_a_call_runs_is_refused(name: str) -> None:
    base = classes()[0]
    mine = type("Mine", (base,), {name: property(lambda self: True) if name.startswith("do_") else lambda *_: None})
    with pytest.raises(BadInput, match=f"the pipeline is a Mine, whose {name} is not that of StableDiffusionPipeline"):
        kind_of(pipeline(mine))


def test_a_class_of_the_same_name_is_not_diffusers() -> None:
    from diffusers import DiffusionPipeline

    theirs = type("StableDiffusionPipeline", (DiffusionPipeline,), {"__call__": lambda self: None})
    with pytest.raises(UnknownName, match="unknown diffusers pipeline"):
        kind_of(theirs())


def test_a_patched_pipeline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    pipe.prepare_latents = lambda *_: None
    with pytest.raises(BadInput, match="prepare_latents of the pipeline was replaced, which would be ignored"):
        kind_of(pipe)
    with monkeypatch.context() as patch:
        home = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
        patch.setattr(f"{home}.rescale_noise_cfg", lambda *_: None)
        with pytest.raises(BadInput, match=f"{home}.rescale_noise_cfg was replaced"):
            kind_of(pipeline())
    monkeypatch.setattr(classes()[0], "__call__", lambda self: None)
    with pytest.raises(BadInput, match=r"StableDiffusionPipeline.__call__ was replaced"):
        kind_of(pipeline())


# --- schedulers


@pytest.mark.parametrize("name", [*SCHEDULERS, "all others"])
def test_schedulers_are_themselves_before_and_after_a_run(name: str) -> None:
    """Also where they were used: what stepping writes into them is no change."""
    import diffusers

    made = [scheduler(name)] if name in SCHEDULERS else [
        getattr(diffusers, kind)()
        for kind in ("DDPMScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler",
                     "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler")
    ]  # fmt: skip
    for one in made:
        assert scheduler_class(one) == type(one).__name__
        one.set_timesteps(4)
        x = torch.ones(1, 4, 4, 4)
        for t in one.timesteps:
            x = one.step(one.scale_model_input(x, t) * 0.1, t, x).prev_sample
        one.set_timesteps(4)
        one.add_noise(x, x, one.timesteps[:1])
        assert scheduler_class(one) == type(one).__name__


def test_functions_that_constructors_make_are_no_change() -> None:
    """SA-Solver keeps one that says where it adds noise."""
    import diffusers

    assert scheduler_class(diffusers.SASolverScheduler()) == "SASolverScheduler"
    other = diffusers.SASolverScheduler()
    other.tau_func = lambda t: 0.5
    with pytest.raises(BadInput, match="tau_func of the pipeline's scheduler is"):
        scheduler_class(other)


def step_of_its_own(one: Any) -> None:
    own = type(one)

    class Mine(own):  # type: ignore[misc]
        def step(self, *args: Any, **keywords: Any) -> Any:
            return super().step(*args, **keywords)

    one.__class__ = Mine


def patched_step(one: Any) -> None:
    own = one.step
    one.step = lambda *args, **keywords: own(*args, **keywords)


def terminal_snr(one: Any) -> None:
    """As it was written into schedulers before they had an option for it."""
    one.alphas_cumprod[-1] = 4.8973451890853435e-08


def other_betas(one: Any) -> None:
    one.betas = one.betas * 1.01


def other_start(one: Any) -> None:
    one.init_noise_sigma = 1.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (step_of_its_own, "scheduler is a Mine, whose step is not that of DDIMScheduler"),
        (patched_step, "step of the pipeline's scheduler was replaced"),
        (terminal_snr, "alphas_cumprod of the pipeline's scheduler"),
        (other_betas, "betas of the pipeline's scheduler"),
        (other_start, "init_noise_sigma of the pipeline's scheduler is 1.1"),
    ],
)
def test_a_scheduler_that_does_other_than_its_class_is_refused(change: Callable[[Any], None], message: str) -> None:
    one = scheduler("ddim")
    change(one)
    with pytest.raises(BadInput, match=message) as caught:
        scheduler_class(one)
    assert "DDIMScheduler.from_config(pipe.scheduler.config)" in caught.value.hint


def test_a_scheduler_subclass_without_code_of_its_own_is_its_base() -> None:
    import diffusers

    class Mine(diffusers.DDIMScheduler):  # type: ignore[misc]
        """Only a name, and a helper."""

        def count(self) -> int:
            return len(self.timesteps)

        def save_pretrained(self, *args: Any, **keywords: Any) -> Any:
            return super().save_pretrained(*args, **keywords)

    assert scheduler_class(Mine.from_config(scheduler("ddim").config)) == "DDIMScheduler"


def test_a_scheduler_of_the_same_name_is_not_diffusers() -> None:
    from diffusers import SchedulerMixin

    for bases in ((), (SchedulerMixin,)):
        with pytest.raises(BadInput, match=r"test_own_code.DDIMScheduler; allowed are diffusers' own classes"):
            scheduler_class(type("DDIMScheduler", bases, {"__module__": __name__})())


def test_a_patched_scheduler_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    one = scheduler("ddim")
    monkeypatch.setattr(diffusers.DDIMScheduler, "set_timesteps", lambda self, steps: None)
    with pytest.raises(BadInput, match=r"DDIMScheduler.set_timesteps was replaced"):
        scheduler_class(one)
