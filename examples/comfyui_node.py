"""A node for ComfyUI: copy this file into its folder custom_nodes, and install tstitch-trt into its environment.

Draws from a bundle at any stitch point. Nodes that draw at once, of several queues, share batches.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

from tstitch_trt.serve import Engine


@cache
def engine_of(bundle: str, device: str) -> Engine:
    """Loaded once, and kept until ComfyUI ends."""
    engine = Engine(bundle, load={"device": device})
    engine.warm_up()
    return engine


class TStitchSampler:
    """``what``: a prompt, or for a bundle of classes a number or the name of one."""

    CATEGORY = "sampling"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {
            "required": {
                "bundle": ("STRING", {"default": "fashion.bundle"}),
                "what": ("STRING", {"default": "", "multiline": True}),
                "fraction": ("FLOAT", {"default": 0.4, "min": 0.0, "max": 1.0, "step": 0.05}),
                "steps": ("INT", {"default": 50, "min": 1, "max": 1000}),
                "guidance": ("FLOAT", {"default": 1.5, "min": 1.0, "max": 30.0, "step": 0.1}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "count": ("INT", {"default": 1, "min": 1, "max": 16}),
            },
            "optional": {"device": (["cpu", "cuda"],)},
        }

    def draw(
        self, bundle: str, what: str, fraction: float, steps: int, guidance: float, seed: int, count: int,
        device: str = "cpu",
    ) -> tuple[torch.Tensor]:  # fmt: skip
        """float32 ``[B,H,W,3]`` from 0 to 1."""
        engine = engine_of(bundle, device)
        conditioning = engine.runtime().manifest.conditioning
        if conditioning.kind == "class":
            label = conditioning.names.index(what) if what in conditioning.names else int(what or 0)
            pictured: dict[str, Any] = {"labels": [label]}
        else:
            pictured = {"prompt": what}
        handle = engine.submit(**pictured, n=count, seed=seed, steps=steps, fraction=fraction, guidance=guidance)
        bar = progress_bar(count * len(handle.plan.schedule))
        try:
            for _ in handle.progress():
                if bar is not None:
                    bar.update(1)  # raises where the user has pressed Cancel
            images = handle.result().images
        finally:
            handle.cancel()
        assert images is not None
        return (torch.from_numpy(np.repeat(images, 3 // images.shape[-1], axis=-1)).float() / 255,)


def progress_bar(steps: int) -> Any:
    """ComfyUI's, or nothing outside of it."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    return ProgressBar(steps)


NODE_CLASS_MAPPINGS = {"TStitchSampler": TStitchSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"TStitchSampler": "T-Stitch sampler"}
