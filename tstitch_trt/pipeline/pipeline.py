"""What ``tstitch_trt.accelerate`` returns: the engines of a pair behind the arguments of a diffusers pipeline."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.checks import check_number, read_mapping
from tstitch_engines.device.step_row import ROW
from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.arguments import default_size, read_arguments
from tstitch_trt.pipeline.callers_words import in_callers_words
from tstitch_trt.pipeline.inputs import (
    control_picture,
    encoded,
    latent_tensor,
    mask_and_picture,
    repeat_to,
    start_picture,
    step_noise_seeds,
    unit_noise,
)
from tstitch_trt.pipeline.kinds import kind_of
from tstitch_trt.pipeline.outputs import call_back, pipeline_output
from tstitch_trt.pipeline.scheduler import AskedSteps, check_plan, more_noise, plan_keywords, read_own
from tstitch_trt.pipeline.stock import StockModule
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.plan.schedule import has_fractions
from tstitch_trt.runtime.chooser import chosen_options
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.runtime.work_queue import EXIT

__all__ = ["AcceleratedPipeline"]

_log = logging.getLogger(__name__)

# What of the pipeline a callback may ask for, beside its components
_SHOWN: Final = ("components", "config", "device", "dtype", "vae_scale_factor", "image_processor", "mask_processor",
                 "control_image_processor", "encode_prompt")  # fmt: skip


class AcceleratedPipeline:
    """Called like ``pipe``, and with ``fraction``, ``rounding`` or ``schedule``. Made by ``tstitch_trt.accelerate``.

    An argument that engines can't honour is a ``BadInput`` that names it. ``pipe`` keeps text encoders, scheduler and
    processors, and its components are shown here too, for callbacks; ``runtime`` has the engines. Any thread may call
    it: one call has ``pipe`` and ``runtime`` to itself (``Runtime.exclusive``), others wait, or raise ``Busy`` after
    ``timeout``. Use it as a context manager, or call ``close``.
    """

    # Nothing else can be set: what a callback writes into a pipeline (``_guidance_scale``) would have no effect here.
    __slots__ = ("__weakref__", "_chosen", "_interrupt", "_kind", "_steps", "_stock", "pipe", "runtime")

    def __init__(self, pipe: Any, runtime: Runtime, chosen: PlanOptions, stock: Mapping[str, StockModule]) -> None:
        self.pipe = pipe
        self.runtime = runtime
        self._kind = kind_of(pipe)
        self._chosen = chosen
        self._stock = dict(stock)
        self._interrupt = False
        self._steps = 0

    def __getattr__(self, name: str) -> Any:
        if name != "pipe" and (name in _SHOWN or name in self.pipe.components):
            return getattr(self.pipe, name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}; the pipeline it was made from is its pipe")

    @property
    def scheduler(self) -> Any:
        """The pipeline's; it may be exchanged at any time."""
        return self.pipe.scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self.pipe.scheduler = value

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt`` in a callback, as with diffusers, to end with the latents of that step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call, or of the last one."""
        return self._steps

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """See ``Runtime.close``."""
        self.runtime.close(cancel=cancel, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def __call__(
        self,
        *args: Any,
        fraction: float | None = None,
        schedule: str | None = None,
        rounding: str | None = None,
        guidance: Mapping[str, float] | None = None,
        latency_budget_ms: float | None = None,
        timeout: float | None = None,
        **keywords: Any,
    ) -> Any:
        """Draws pictures; arguments and result are those of the pipeline. Raises ``BadInput`` and its kinds.

        Each member takes ``guidance_scale`` as its own pipeline would: a UNet with ``time_cond_proj_dim`` as an input,
        a plain one as the scale of its two halves where it is above 1. In a ``LatentConsistencyModelPipeline``, which
        never runs a second half, a plain UNet is not guided. ``guidance={"small": 7.5}`` gives scales by member in
        place of it, and so does ``:g=`` in a schedule.

        ``timeout``: seconds to wait for other calls, by default those given to ``accelerate``.

        ``latency_budget_ms``: the best schedule whose steps take at most so long (``Runtime.within_budget``), in place
        of ``fraction`` or ``schedule``. The bundle is calibrated by ``tstitch-trt calibrate`` on
        ``runtime.bundle.root``, or ``tstitch_trt.study.calibrate.calibrate``.
        """
        with in_callers_words(), self.runtime.exclusive(timeout=timeout):
            asked = PlanOptions(fraction=fraction, schedule=schedule, rounding=rounding)
            return self._call(args, keywords, asked, guidance, latency_budget_ms)

    def _call(
        self,
        args: tuple[Any, ...],
        keywords: Mapping[str, Any],
        asked: PlanOptions,
        guidance: Mapping[str, float] | None,
        latency_budget_ms: float | None,
    ) -> Any:
        import torch

        self._check_pipeline()
        a = read_arguments(self.pipe, self._kind, args, keywords)
        self._interrupt = False
        try:
            with torch.no_grad():
                options = self._options(a, asked if latency_budget_ms is not None else self._shares(asked))
                options = replace(options, guidance=self._guidance(a, guidance))
                guided = self._halves(options)
                given = EXIT.run(lambda: self._texts(a, guided=guided))
                count = given["n"]
                given |= EXIT.run(lambda: self._pictures(a, count, *default_size(self.pipe, self._kind, a)))
                if latency_budget_ms is not None:
                    options = self._within(latency_budget_ms, a, given, options)
                plan = make_plan(self.runtime.manifest, options)
                check_plan(self.pipe.scheduler, _asked_steps(a), plan)
                if not any(plan.guided):
                    given = {key: value for key, value in given.items() if not key.startswith("negative")}
                    options = replace(options, guidance_rescale=None)
                    self._warn_unguided(a)
                if a.denoising_start is not None:
                    given["start_step"] = first = self._first(a.denoising_start, plan)
                    if first == 0:  # the runtime scales what it starts from there; these latents have their noise
                        given["latents"] = given["latents"] / np.float32(plan.init_scale)
                elif (more := more_noise(self.pipe.scheduler, _asked_steps(a), plan)) != 1:
                    given["latents"] = self._scaled(given["latents"], more, a)
                if plan.rows[:, ROW["S"]].any():
                    given["seeds"] = step_noise_seeds(a.generator, count)
                found = self._run(a, given, options, self._stop(a, plan))
                return EXIT.run(lambda: pipeline_output(self.pipe, self.runtime, found, a, xl=self._kind.xl))
        finally:
            self.pipe.maybe_free_model_hooks()  # where it offloads its text encoders

    def _check_pipeline(self) -> None:
        """Raises ``BadInput`` where the pipeline is no longer the one that the engines were made from."""
        kind_of(self.pipe)
        for name, stock in self._stock.items():
            stock.check(getattr(self.pipe, name))

    # --- what is asked for

    def _within(
        self, budget_ms: float, a: SimpleNamespace, given: Mapping[str, Any], options: PlanOptions
    ) -> PlanOptions:
        """``options`` with the schedule that the budget allows."""
        if a.denoising_start is not None or a.denoising_end is not None:
            raise BadInput(
                "latency_budget_ms was given beside denoising_start or denoising_end: a budget is for a whole "
                "trajectory",
                hint="leave out one of them, or give schedule=",
            )
        return chosen_options(options, self.runtime.within_budget(budget_ms, **given, **options.explicit()))

    def _scaled(self, latents: Any, more: np.float32, a: SimpleNamespace) -> Any:
        """The first state, where the scheduler starts from more than the plan's; from a picture that is of no use."""
        if not self._kind.starts:
            return latents * more
        if self._kind.masked and a.strength == 1:
            raise BadInput(
                f"timesteps were given beside strength 1, and {type(self.pipe.scheduler).__name__} with "
                "timestep_spacing 'leading' starts from noise of another strength than its first timestep",
                hint="use strength=0.999, num_inference_steps, or another timestep_spacing",
            )
        return latents

    def _shares(self, asked: PlanOptions) -> PlanOptions:
        """The schedule of a call: what it asks for, and where that leaves room what ``accelerate`` was given."""
        schedule = asked.schedule
        if schedule is None and asked.fraction is None:
            return asked.on_top_of(self._chosen)
        if asked.rounding is None and (schedule is None or has_fractions(schedule)):
            return replace(asked, rounding=self._chosen.rounding)
        return asked

    def _options(self, a: SimpleNamespace, shares: PlanOptions) -> PlanOptions:
        """How to draw: the pipeline's scheduler as it is now."""
        self._check_scheduler()
        settings: dict[str, Any] = {**plan_keywords(self.pipe.scheduler, _asked_steps(a)), **shares.explicit()}
        settings["guidance_rescale"] = a.guidance_rescale
        return PlanOptions.from_keywords(settings)

    def _guidance(self, a: SimpleNamespace, own: Mapping[str, float] | None) -> float | Mapping[str, float]:
        """The scale of each member, one number where all have the same. ``own`` goes first."""
        members = self.runtime.manifest.members
        halves = float(a.guidance_scale) if a.guidance_scale > 1 and not self._kind.distilled else 1.0
        scales = {name: float(a.guidance_scale) if one.guidance_embedding else halves for name, one in members.items()}
        for name, scale in read_mapping({} if own is None else own, "guidance", example='{"small": 7.5}').items():
            scales[name] = check_number(scale, f"guidance of {name!r}")
        return scales if len(set(scales.values())) > 1 else next(iter(scales.values()))

    def _halves(self, options: PlanOptions) -> bool:
        """Whether steps may have two halves. Without a schedule any member may run."""
        manifest, every = self.runtime.manifest, [options]
        if options.schedule is None and options.fraction is None:
            every = [replace(options, schedule=name, rounding=None) for name in manifest.members]
        return any(any(make_plan(manifest, one).guided) for one in every)

    def _warn_unguided(self, a: SimpleNamespace) -> None:
        """The pipeline takes them in silence."""
        for name in ("negative_prompt", "negative_prompt_2", "guidance_rescale"):
            if getattr(a, name):
                _log.warning("%s has no effect: none of these steps has an unconditional half", name)

    def _check_scheduler(self) -> None:
        """Raises ``BadInput`` for one that can't be honoured or that was made for other noise than the bundle."""
        found = read_own(self.pipe.scheduler)
        manifest = self.runtime.manifest
        if found.noise != manifest.noise or found.parametrisation != manifest.members["large"].parametrisation:
            raise BadInput(
                f"the pipeline's scheduler is for {found.parametrisation} models trained with {found.noise}; the "
                f"bundle is for {manifest.members['large'].parametrisation} and {manifest.noise}",
                hint="make it with from_config(pipe.scheduler.config), or call accelerate again",
            )

    def _texts(self, a: SimpleNamespace, *, guided: bool) -> dict[str, Any]:
        """Embeddings by the pipeline's own text encoders, and how many pictures there are."""
        keywords = {
            "device": self.pipe._execution_device,
            "num_images_per_prompt": a.num_images_per_prompt,
            "do_classifier_free_guidance": guided,
            "clip_skip": a.clip_skip,
        }
        names = ["prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"]
        if self._kind.xl:
            names += ["prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        try:
            found = self.pipe.encode_prompt(**keywords, **{name: getattr(a, name) for name in names})
        except (IndexError, TypeError, ValueError) as error:  # clip_skip beyond the layers, lists of other lengths
            raise BadInput(
                f"{type(self.pipe).__name__} can't encode this prompt: {str(error)[:500]}",
                hint="see the arguments prompt, negative_prompt and clip_skip of the pipeline",
            ) from error
        keys = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given = {
            key: latent_tensor(value)
            for key, value in zip(keys, found, strict=False)
            if value is not None and (guided or not key.startswith("negative"))
        }
        return {**given, **(self._sizes(a) if self._kind.xl else {}), "n": len(given["prompt_embeds"])}

    def _sizes(self, a: SimpleNamespace) -> dict[str, Any]:
        """SDXL's micro-conditioning."""
        found = {"original_size": a.original_size, "crop": a.crops_coords_top_left, "target_size": a.target_size}
        texts = [member.text for member in self.runtime.manifest.members.values() if member.text is not None]
        if any(text.time_ids == "aesthetic" for text in texts):
            found |= {"aesthetic_score": a.aesthetic_score, "negative_aesthetic_score": a.negative_aesthetic_score}
            if any(found["crop"] or ()):
                raise BadInput(
                    f"crops_coords_top_left is {found['crop']}; with an aesthetic score allowed is (0, 0): both halves "
                    "of a guided step have one crop",
                    hint="leave it out",
                )
        return {key: value for key, value in found.items() if value is not None}

    def _pictures(self, a: SimpleNamespace, count: int, height: int | None, width: int | None) -> dict[str, Any]:
        """The noise, and the pictures to start from and to follow, drawn from ``generator`` in diffusers' order."""
        pipe, kind = self.pipe, self._kind
        given: dict[str, Any] = {}
        if kind.control is not None:
            control = control_picture(pipe, getattr(a, kind.control), height, width, a.num_images_per_prompt)
            given |= {"control": control, "control_scale": a.controlnet_conditioning_scale}
            if not kind.starts:
                height, width = control.shape[2:]
        if kind.starts:
            picture = start_picture(pipe, a.image, height, width, self.runtime.manifest.latent.channels)
            if kind.masked and a.denoising_start is not None:
                raise BadInput("denoising_start was given beside a mask", hint="use strength")
            return given | self._start(a, picture, count, height, width)
        assert height is not None, "only pipelines that start from a picture have no size of their own"
        assert width is not None, "given with the size above"
        given |= {"height": height, "width": width}
        latents = self._latent_shape(count, height, width)
        given["latents"] = latent_tensor(a.latents) if a.latents is not None else unit_noise(pipe, latents, a.generator)
        return given

    def _latent_shape(self, count: int, height: int, width: int) -> tuple[int, int, int, int]:
        factor = self.pipe.vae_scale_factor
        return count, self.runtime.manifest.latent.channels, height // factor, width // factor

    def _start(
        self, a: SimpleNamespace, picture: Any, count: int, height: int | None, width: int | None
    ) -> dict[str, Any]:
        """``picture``: float ``[K,3,H,W]`` in [-1, 1], or latents."""
        pipe, kind = self.pipe, self._kind
        members = self.runtime.manifest.members
        known = picture.shape[1] == self.runtime.manifest.latent.channels
        upcast = kind.xl and bool(pipe.vae.config.get("force_upcast"))
        if a.denoising_start is not None:  # latents in the middle of a trajectory
            if not known:
                raise BadInput("denoising_start was given with a picture", hint="give image= latents")
            return {"latents": repeat_to(latent_tensor(picture), count)}
        if a.latents is not None and (not kind.masked or a.strength != 1):
            raise BadInput("latents were given beside image", hint="give latents as image=, or noise by generator=")
        if height is None or width is None:
            scale = pipe.vae_scale_factor if known else 1
            height, width = picture.shape[2] * scale, picture.shape[3] * scale
        shape = self._latent_shape(count, height, width)
        if known:
            clean = repeat_to(latent_tensor(picture), count)
        elif kind.masked and members["large"].inpaints and a.strength == 1:  # nothing of the picture is in the noise
            clean = np.zeros(shape, np.float32)
        else:  # with a mask as many draws as pictures, whoever draws them
            each = count if isinstance(a.generator, list) and not kind.masked else None
            clean = repeat_to(encoded(self.runtime, pipe, picture, a.generator, count=each, upcast=upcast), count)
        drawn = latent_tensor(a.latents) if a.latents is not None else unit_noise(pipe, shape, a.generator)
        found: dict[str, Any] = {"image": clean, "latents": drawn, "strength": a.strength}
        if not kind.masked:
            return found
        mask, outside = mask_and_picture(pipe, a.mask_image, picture, height, width)
        found["mask"] = repeat_to(mask, count, "masks")
        if not any(member.inpaints for member in members.values()):
            return found
        if a.masked_image_latents is not None:
            return {**found, "masked_image": repeat_to(latent_tensor(a.masked_image_latents), count)}
        if known:
            raise BadInput(
                "image is latents, and a UNet that paints into a picture needs the picture itself",
                hint="give masked_image_latents= too: those of the picture with grey where it is painted anew",
            )
        return {**found, "masked_image": encoded(self.runtime, pipe, outside, a.generator, upcast=upcast)}

    # --- carrying it out

    def _cut(self, share: float, what: str, plan: Plan) -> int:
        """How many steps have a timestep before the share of the trajectory, as diffusers rounds it."""
        if not 0 < share < 1:
            raise BadInput(f"{what} is {share}; allowed is between 0 and 1", hint="e.g. 0.8")
        train = self.runtime.manifest.noise.steps
        return int(np.count_nonzero(plan.table.t >= round(train - share * train)))

    def _stop(self, a: SimpleNamespace, plan: Plan) -> int | None:
        """The number of steps after which ``denoising_end`` ends; ``None``: after the last one."""
        if a.denoising_end is None or a.denoising_end == 1:
            return None
        if a.denoising_start is not None and a.denoising_start >= a.denoising_end:
            raise BadInput(
                f"denoising_start {a.denoising_start} is not before denoising_end {a.denoising_end}",
                hint="the refiner starts where the base ended",
            )
        stop = self._cut(a.denoising_end, "denoising_end", plan)
        if stop == 0:
            raise BadInput(f"denoising_end {a.denoising_end} leaves no step", hint="use a larger one, or more steps")
        return None if stop == plan.steps else stop

    def _first(self, share: float, plan: Plan) -> int:
        """The step at which ``denoising_start`` enters."""
        start = self._cut(share, "denoising_start", plan)
        if start >= plan.steps:
            raise BadInput(f"denoising_start {share} leaves no step", hint="use a smaller one, or more steps")
        return start

    def _run(
        self, a: SimpleNamespace, given: Mapping[str, Any], options: PlanOptions, stop: int | None
    ) -> NDArray[np.float32]:
        callback = a.callback_on_step_end
        if callback is None and stop is None:
            return self.runtime.sample(**given, **options.explicit(), decode=False).latents
        events = self.runtime.iterate(**given, **options.explicit(), decode=False)
        done = 0
        try:
            while True:
                event = next(events)
                if event.chunks > 1:
                    raise BadInput(
                        f"{given['n']} pictures run in {event.chunks} parts; allowed with a callback or denoising_end "
                        "is one",
                        hint='accelerate with a larger batch, e.g. batch="1:4:32", or ask for fewer',
                    )
                if done == 0:
                    self._steps = (event.steps if stop is None else stop) - event.step + 1
                    if self._steps < 1:
                        raise BadInput(
                            f"denoising_end {a.denoising_end} lies before the first step of strength {a.strength}",
                            hint="use larger ones",
                        )
                if callback is not None:
                    call_back(self, callback, done, event)
                done += 1
                if event.step == stop or self._interrupt:
                    return np.array(event.latents())
        except StopIteration as finished:
            found: NDArray[np.float32] = finished.value.latents
            return found
        finally:
            events.close()


def _asked_steps(a: SimpleNamespace) -> AskedSteps:
    return AskedSteps(
        steps=a.num_inference_steps if a.timesteps is None else None,
        timesteps=a.timesteps,
        original_inference_steps=a.original_inference_steps,
        eta=a.eta or 0.0,
    )
