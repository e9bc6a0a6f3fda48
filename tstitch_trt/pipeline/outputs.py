"""What an accelerated pipeline hands out as its pipeline does: the latents of a step, and the result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.vae_tiles import decode_images
from tstitch_trt.runtime.result import StepEvent
from tstitch_trt.runtime.runtime import Runtime

__all__ = ["call_back", "pipeline_output"]


def call_back(pipe: Any, callback: Any, step: int, event: StepEvent) -> None:
    """``callback_on_step_end`` after the ``step``-th step that runs, from 0. Raises ``BadInput`` if it asks for more
    than to look."""
    import torch

    whole = float(event.timestep).is_integer()
    t = torch.tensor(int(event.timestep) if whole else event.timestep)
    latents = torch.from_numpy(np.array(event.latents()))
    shown = latents.clone()
    answer = callback(pipe, step, t, {"latents": shown}) or {}
    if not torch.equal(shown, latents) or answer.get("latents", shown) is not shown:
        raise BadInput(
            f"callback_on_step_end changed the latents after step {step}, which compiled engines can't honour",
            hint="only look at them there, or call the pipeline itself: accelerated.pipe(...)",
        )


def pipeline_output(pipe: Any, runtime: Runtime, latents: NDArray[np.float32], a: SimpleNamespace, *, xl: bool) -> Any:
    """As the pipeline's own: safety checker, watermark and conversion are its."""
    import torch

    flags = None
    device = pipe._execution_device
    if a.output_type == "latent":
        image = torch.from_numpy(latents).to(device, pipe.unet.dtype)
    else:
        image = torch.from_numpy(decode_images(runtime, pipe.vae, latents)).to(device)
        if not xl:
            image, flags = pipe.run_safety_checker(image, device, pipe.unet.dtype)
    if xl:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput

        if a.output_type != "latent" and getattr(pipe, "watermark", None) is not None:
            image = pipe.watermark.apply_watermark(image)
        shown = pipe.image_processor.postprocess(image, output_type=a.output_type)
        return StableDiffusionXLPipelineOutput(images=shown) if a.return_dict else (shown,)
    from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput

    plain = [True] * len(image) if flags is None else [not flag for flag in flags]
    shown = pipe.image_processor.postprocess(image, output_type=a.output_type, do_denormalize=plain)
    if not a.return_dict:
        return shown, flags
    return StableDiffusionPipelineOutput(images=shown, nsfw_content_detected=flags)
