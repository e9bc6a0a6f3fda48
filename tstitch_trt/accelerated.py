"""What ``tstitch_trt.accelerate`` returns: the engines of a pair behind the arguments of a diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput, unknown_name
from tstitch_engines.rows import ROW
from tstitch_engines.scheduler_config import Scheduler, read_scheduler
from tstitch_trt.budgeting import chosen_settings
from tstitch_trt.pipeline_inputs import (
    arrays,
    control_picture,
    encoded,
    latent_tensor,
    mask_and_picture,
    step_noise_seeds,
    unit_noise,
)
from tstitch_trt.runtime import Runtime

__all__ = ["KINDS", "AcceleratedPipeline", "Kind"]

OUTPUTS: Final = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A pipeline class: the recipe of its pairs, whether ``image`` is what it starts from, where control is given."""

    recipe: str
    starts: bool = False
    masked: bool = False
    control: str | None = None

    @property
    def xl(self) -> bool:
        return self.recipe.startswith("sdxl")


def _kinds() -> dict[str, Kind]:
    found: dict[str, Kind] = {}
    for name, recipe in (("StableDiffusion", "sd15-bksdm-tiny"), ("StableDiffusionXL", "sdxl-ssd1b")):
        found[f"{name}Pipeline"] = Kind(recipe=recipe)
        found[f"{name}Img2ImgPipeline"] = Kind(recipe=recipe, starts=True)
        found[f"{name}InpaintPipeline"] = Kind(recipe=recipe, starts=True, masked=True)
        found[f"{name}ControlNetPipeline"] = Kind(recipe=recipe, control="image")
        found[f"{name}ControlNetImg2ImgPipeline"] = Kind(recipe=recipe, starts=True, control="control_image")
    return found


KINDS: Final[Mapping[str, Kind]] = _kinds()

# The arguments of diffusers' pipelines that are heeded; any other may only have its default.
_HEEDED: Final = (
    "prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "image", "mask_image", "masked_image_latents",
    "control_image", "height", "width", "strength", "num_inference_steps", "timesteps", "denoising_start",
    "denoising_end", "guidance_scale", "guidance_rescale", "num_images_per_prompt", "eta", "generator", "latents",
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    "output_type", "return_dict", "original_size", "crops_coords_top_left", "target_size", "aesthetic_score",
    "negative_aesthetic_score", "clip_skip", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    "controlnet_conditioning_scale"
)  # fmt: skip


class AcceleratedPipeline:
    """Called like ``pipe``, and with ``fraction`` or ``schedule`` besides. Made by ``tstitch_trt.accelerate``.

    An argument that engines can't honour is a ``BadInput`` that names it. ``pipe`` keeps text encoders, scheduler and
    processors; ``runtime`` has the engines. Use it as a context manager, or call ``close``.
    """

    def __init__(self, pipe: Any, runtime: Runtime, chosen: Mapping[str, Any]) -> None:
        self.pipe = pipe
        self.runtime = runtime
        self._kind = KINDS[type(pipe).__name__]
        self._chosen = dict(chosen)
        self._signature = inspect.signature(type(pipe).__call__)
        self._interrupt = False

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

    def close(self) -> None:
        self.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(
        self,
        *args: Any,
        fraction: float | None = None,
        schedule: str | None = None,
        latency_budget_ms: float | None = None,
        **keywords: Any,
    ) -> Any:
        """Draws pictures; arguments and result are those of the pipeline. Raises ``BadInput`` and its kinds.

        ``latency_budget_ms``: the best schedule whose steps take at most so long (``Runtime.within_budget``), in place
        of ``fraction`` or ``schedule``. The bundle is calibrated by ``tstitch-trt calibrate`` on
        ``runtime.bundle.root``, or ``tstitch_trt.cost.calibrate``.
        """
        import torch

        a = self._arguments(args, keywords)
        self._interrupt = False
        with torch.no_grad():
            settings = self._settings(a, fraction, schedule, usual={} if latency_budget_ms else self._chosen)
            given = self._texts(a)
            count = given["n"]
            height, width = self._size(a)
            given |= self._pictures(a, count, height, width)
            if latency_budget_ms is not None:
                if a.denoising_start is not None or a.denoising_end is not None:
                    raise BadInput(
                        "latency_budget_ms was given beside denoising_start or denoising_end: a budget is for a whole "
                        "trajectory",
                        hint="leave out one of them, or give schedule=",
                    )
                settings = chosen_settings(settings, self.runtime.within_budget(latency_budget_ms, **given, **settings))
            plan = self.runtime.plan(**settings)
            if a.denoising_start is not None:
                given |= self._state(given, plan, a.denoising_start)
            if plan.rows[:, ROW["S"]].any():
                given["seeds"] = step_noise_seeds(a.generator, count)
            found = self._run(a, given, settings, self._stop(a, plan))
            return self._result(a, found)

    # --- what is asked for

    def _arguments(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> SimpleNamespace:
        """Every argument of the pipeline, with its default where nothing is said."""
        known = [name for name in self._signature.parameters if name not in ("self", "kwargs")]
        for name in keywords:
            if name not in known:
                ours = ("fraction", "schedule", "latency_budget_ms")
                raise unknown_name(f"argument of {type(self.pipe).__name__}", name, [*known, *ours])
        try:
            bound = self._signature.bind(self.pipe, *args, **keywords)
        except TypeError as error:
            raise BadInput(
                f"the arguments do not fit {type(self.pipe).__name__}: {error}", hint="use keywords"
            ) from None
        bound.apply_defaults()
        values = dict.fromkeys(_HEEDED)
        for name in known:
            value, default = bound.arguments[name], self._signature.parameters[name].default
            if name not in _HEEDED and not _same(value, default):
                raise BadInput(
                    f"{name} was given, which compiled engines can't honour; allowed is {default!r}",
                    hint="leave it out, or call the pipeline itself: accelerated.pipe(...)",
                )
            values[name] = value
        a = SimpleNamespace(**values)
        if a.output_type not in OUTPUTS:
            raise unknown_name("output_type", str(a.output_type), OUTPUTS)
        inputs = a.callback_on_step_end_tensor_inputs
        if a.callback_on_step_end is not None:
            inputs = getattr(a.callback_on_step_end, "tensor_inputs", inputs)
        if a.callback_on_step_end is not None and set(inputs) - {"latents"}:
            raise BadInput(
                f"callback_on_step_end_tensor_inputs is {list(inputs)}; allowed is ['latents']: the others are in "
                "the engines' memory",
                hint="leave it out",
            )
        if (a.prompt is None) == (a.prompt_embeds is None):
            raise BadInput("give either prompt or prompt_embeds", hint='e.g. prompt="a red fox"')
        return a

    def _settings(
        self, a: SimpleNamespace, fraction: float | None, schedule: str | None, usual: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The keywords of a plan: the pipeline's scheduler as it is now. ``usual``: without fraction and schedule."""
        found = self._scheduler()
        settings: dict[str, Any] = {"solver": found.solver, "solver_options": dict(found.options)}
        if a.timesteps is not None:
            settings["timesteps"] = [float(t) for t in a.timesteps]
            settings["solver_options"].pop("steps_offset", None)
        else:
            settings["steps"] = a.num_inference_steps
            if found.solver != "lcm":
                settings["spacing"] = found.spacing
        if found.solver == "ddim" and a.eta:
            settings["eta"] = a.eta
        asked = {"fraction": fraction, "schedule": schedule}
        settings |= {key: value for key, value in asked.items() if value is not None} or dict(usual)
        guided = a.guidance_scale > 1 or any(m.guidance_embedding for m in self.runtime.manifest.members.values())
        settings["guidance"] = float(a.guidance_scale) if guided else 1.0
        settings["guidance_rescale"] = a.guidance_rescale or 0.0
        return settings

    def _scheduler(self) -> Scheduler:
        """Raises ``BadInput`` for one that can't be honoured or that was made for other noise than the bundle."""
        config = {**self.pipe.scheduler.config, "_class_name": type(self.pipe.scheduler).__name__}
        found = read_scheduler(config, where="the pipeline's scheduler")
        manifest = self.runtime.manifest
        if found.noise != manifest.noise or found.parametrisation != manifest.members["large"].parametrisation:
            raise BadInput(
                f"the pipeline's scheduler is for {found.parametrisation} models trained with {found.noise}; the "
                f"bundle is for {manifest.members['large'].parametrisation} and {manifest.noise}",
                hint="make it with from_config(pipe.scheduler.config), or call accelerate again",
            )
        return found

    def _texts(self, a: SimpleNamespace) -> dict[str, Any]:
        """Embeddings by the pipeline's own text encoders, and how many pictures there are."""
        members = self.runtime.manifest.members.values()
        guided = a.guidance_scale > 1 and not all(member.guidance_embedding for member in members)
        keywords = {
            "device": self.pipe._execution_device,
            "num_images_per_prompt": a.num_images_per_prompt,
            "do_classifier_free_guidance": guided,
            "clip_skip": a.clip_skip,
        }
        names = ["prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"]
        if self._kind.xl:
            names += ["prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        found = self.pipe.encode_prompt(**keywords, **{name: getattr(a, name) for name in names})
        keys = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given = {key: value for key, value in zip(keys, found, strict=False) if value is not None}
        if not guided:
            given = {key: value for key, value in given.items() if not key.startswith("negative")}
        count = len(given["prompt_embeds"])
        return {**arrays(given), **(self._sizes(a) if self._kind.xl else {}), "n": count}

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

    def _size(self, a: SimpleNamespace) -> tuple[int | None, int | None]:
        """Height and width in pixels as the pipeline finds them; ``None``: those of the pictures it is given."""
        if (self._kind.starts and not self._kind.masked) or self._kind.control == "image":
            return a.height, a.width
        side = self.pipe.unet.config.sample_size
        own = [side, side] if isinstance(side, int) else list(side)
        factor = self.pipe.vae_scale_factor
        if not self._kind.xl and not (a.height and a.width):
            return own[0] * factor, own[1] * factor
        return a.height or own[0] * factor, a.width or own[1] * factor

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
            if a.image is None:
                raise BadInput("image is missing", hint=f"{type(pipe).__name__} starts from a picture: image=...")
            picture = pipe.image_processor.preprocess(a.image, height=height, width=width).float()
            if kind.masked and a.denoising_start is not None:
                raise BadInput("denoising_start was given beside a mask", hint="use strength")
            return given | self._start(a, picture, count, height, width)
        assert height is not None, "only pipelines that start from a picture have no size of their own"
        assert width is not None, "as was just said"
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
        pipe, kind = self.pipe, self._kind
        if a.denoising_start is not None:  # latents in the middle of a trajectory
            if picture.shape[1] != self.runtime.manifest.latent.channels:
                raise BadInput("denoising_start was given with a picture", hint="give image= latents")
            return {"latents": latent_tensor(picture)}
        if a.latents is not None and not kind.masked:
            raise BadInput("latents were given beside image", hint="give latents as image=, or noise by generator=")
        large = self.runtime.manifest.members["large"]
        pure = kind.masked and a.strength == 1  # nothing of the picture is in the noise
        needed = not (kind.masked and large.inpaints and pure)
        known = picture.shape[1] == self.runtime.manifest.latent.channels
        clean = None
        if known:
            clean = latent_tensor(picture)
        elif needed:
            clean = encoded(self.runtime, pipe, picture, a.generator, count)
        if height is None or width is None:
            scale = pipe.vae_scale_factor if known else 1
            height, width = picture.shape[2] * scale, picture.shape[3] * scale
        shape = self._latent_shape(count, height, width)
        drawn = latent_tensor(a.latents) if a.latents is not None else unit_noise(pipe, shape, a.generator)
        image = np.zeros(shape, np.float32) if clean is None else np.repeat(clean, -(-count // len(clean)), 0)[:count]
        found: dict[str, Any] = {"image": image, "latents": drawn, "strength": a.strength}
        if kind.masked:
            mask, outside = mask_and_picture(pipe, a.mask_image, picture, height, width)
            found["mask"] = mask
            if any(member.inpaints for member in self.runtime.manifest.members.values()):
                if a.masked_image_latents is not None:
                    found["masked_image"] = latent_tensor(a.masked_image_latents)
                else:
                    found["masked_image"] = encoded(self.runtime, pipe, outside, a.generator, count)
        return found

    # --- carrying it out

    def _cut(self, share: float, what: str, plan: Any) -> int:
        """How many steps have a timestep before the share of the trajectory, as diffusers rounds it."""
        if not 0 < share < 1:
            raise BadInput(f"{what} is {share}; allowed is between 0 and 1", hint="e.g. 0.8")
        train = self.runtime.manifest.noise.steps
        return int(np.count_nonzero(plan.table.t >= round(train - share * train)))

    def _stop(self, a: SimpleNamespace, plan: Any) -> int | None:
        """The number of steps after which ``denoising_end`` ends; ``None``: after the last one."""
        if a.denoising_end is None:
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

    def _state(self, given: Mapping[str, Any], plan: Any, share: float) -> dict[str, Any]:
        start = self._cut(share, "denoising_start", plan)
        if start >= plan.steps:
            raise BadInput(f"denoising_start {share} leaves no step", hint="use a smaller one, or more steps")
        latents = given["latents"]
        return {"latents": np.repeat(latents, -(-given["n"] // len(latents)), 0)[: given["n"]], "start_step": start}

    def _run(
        self, a: SimpleNamespace, given: Mapping[str, Any], settings: Mapping[str, Any], stop: int | None
    ) -> NDArray[np.float32]:
        callback = a.callback_on_step_end
        if callback is None and stop is None:
            return self.runtime.sample(**given, **settings, decode=False).latents
        walk = self.runtime.iterate(**given, **settings, decode=False)
        done = 0
        try:
            while True:
                event = next(walk)
                if event.chunks > 1:
                    raise BadInput(
                        f"{given['n']} pictures run in {event.chunks} parts; allowed with a callback or denoising_end "
                        "is one",
                        hint='accelerate with a larger batch, e.g. batch="1:4:32", or ask for fewer',
                    )
                if callback is not None:
                    self._call_back(callback, done, event)
                done += 1
                if event.step == stop or self._interrupt:
                    return np.array(event.latents())
        except StopIteration as finished:
            found: NDArray[np.float32] = finished.value.latents
            return found
        finally:
            walk.close()

    def _call_back(self, callback: Any, step: int, event: Any) -> None:
        import torch

        whole = float(event.timestep).is_integer()
        t = torch.tensor(int(event.timestep) if whole else event.timestep)
        latents = torch.from_numpy(np.array(event.latents()))
        shown = latents.clone()
        answer = callback(self, step, t, {"latents": shown}) or {}
        if not torch.equal(shown, latents) or answer.get("latents", shown) is not shown:
            raise BadInput(
                f"callback_on_step_end changed the latents after step {step}, which compiled engines can't honour",
                hint="only look at them there, or call the pipeline itself: accelerated.pipe(...)",
            )

    def _result(self, a: SimpleNamespace, latents: NDArray[np.float32]) -> Any:
        """As the pipeline's own: safety checker, watermark and conversion are its."""
        import torch

        pipe, flags = self.pipe, None
        device = pipe._execution_device
        if a.output_type == "latent":
            image = torch.from_numpy(latents).to(device, pipe.unet.dtype)
        else:
            image = torch.from_numpy(self.runtime.images(latents)).to(device)
            if not self._kind.xl:
                image, flags = pipe.run_safety_checker(image, device, pipe.unet.dtype)
        if self._kind.xl:
            from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput

            if a.output_type != "latent" and pipe.watermark is not None:
                image = pipe.watermark.apply_watermark(image)
            shown = pipe.image_processor.postprocess(image, output_type=a.output_type)
            return StableDiffusionXLPipelineOutput(images=shown) if a.return_dict else (shown,)
        from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput

        plain = [True] * len(image) if flags is None else [not flag for flag in flags]
        shown = pipe.image_processor.postprocess(image, output_type=a.output_type, do_denormalize=plain)
        if not a.return_dict:
            return shown, flags
        return StableDiffusionPipelineOutput(images=shown, nsfw_content_detected=flags)


def _same(value: Any, default: Any) -> bool:
    """Whether nothing is asked for by this value."""
    if value is default or value is None or (isinstance(value, Mapping) and not value):
        return True
    return isinstance(value, bool | int | float | str | tuple | list) and value == default
