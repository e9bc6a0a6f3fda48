"""What both trainings share: options, the loop, checkpoints that survive an interruption, learning rate and EMA."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Budget", "Ema", "learning_rate", "parse_options", "resume", "run", "save_state", "training_parser"]

_WARMUP = 200  # steps
_SAVE_SECONDS = 60


def training_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four idx.gz files")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and results go here")
    parser.add_argument("--images", type=int, help="train on this many images (with repetition)")
    parser.add_argument("--minutes", type=float, help="train for this long, summed over resumed runs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the threads set and the output folder made."""
    args = parser.parse_args(argv)
    if not args.images and not args.minutes:
        parser.error("say how long to train: --images N or --minutes M")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def run(
    optimiser: torch.optim.Optimizer,
    peak_rate: float,
    *,
    step: int,
    share: Callable[[int], float],
    advance: Callable[[int, float], None],
    save: Callable[[int], None],
) -> int | None:
    """Trains from ``step`` until ``share(step)`` of the work is 1; the number of steps, ``None`` when interrupted.

    ``advance(step, share)`` makes one step. ``save(steps)`` is called once a minute and at the end.
    """
    saved = time.monotonic()
    try:
        while (progress := share(step)) < 1:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(peak_rate, progress, step, _WARMUP)
            advance(step, progress)
            step += 1
            if time.monotonic() - saved > _SAVE_SECONDS:
                save(step)
                saved = time.monotonic()
    except KeyboardInterrupt:
        print("interrupted: saved, the same command goes on from here", file=sys.stderr)
        save(step)
        return None
    save(step)
    return step


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


def resume(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, budget: Budget) -> dict[str, Any]:
    """Puts the state at ``path`` back and gives all of it; at the start, one that says step 0."""
    if not path.is_file():
        return {"step": 0}
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    budget.seconds_before = state["seconds"]
    print(f"resumed at step {state['step']}", file=sys.stderr)
    return state


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes beside ``path`` and renames: an interruption leaves the last whole checkpoint."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)
