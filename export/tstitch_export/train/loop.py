"""What both trainings share: checkpoints that survive an interruption, the learning rate and the EMA."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Budget", "Ema", "learning_rate", "load_state", "save_state"]


@dataclass
class Budget:
    """How long to train: a number of images, or minutes of training time summed over all resumed runs.

    With ``minutes`` the cosine decay follows the clock, so a run on a busy machine still ends with a low rate.
    """

    images: int | None
    minutes: float | None
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def progress(self, images_seen: int) -> float:
        shares = [images_seen / self.images] if self.images else []
        if self.minutes:
            shares.append(self.seconds() / (60 * self.minutes))
        return min(1.0, max(shares))


def learning_rate(peak: float, progress: float, step: int, warmup: int) -> float:
    """Linear warm-up over ``warmup`` steps, then half a cosine down to 1 % of ``peak``."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Ema:
    """Exponential moving average of the parameters, with the usual ramp so that the start is forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            self.values[name].lerp_(p, 1 - keep)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes beside ``path`` and renames: an interruption leaves the last whole checkpoint."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
