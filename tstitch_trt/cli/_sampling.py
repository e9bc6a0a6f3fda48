"""The options that say how to walk a trajectory, shared by the commands that sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["bundle_argument", "runtime_options", "step_options"]

F = TypeVar("F", bound=Callable[..., Any])


def bundle_argument(function: F) -> F:
    return click.argument("bundle", type=click.Path(path_type=Path))(function)


def runtime_options(function: F) -> F:
    """Where and with what to run."""
    for option in (
        click.option("--threads", type=click.IntRange(0), default=0, metavar="N", help="CPU threads, 0 = all cores."),
        click.option(
            "--backend", metavar="NAME", help="Backend whose engine to load (default: the one the bundle has)."
        ),
        click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N."),
    ):
        function = option(function)
    return function


def step_options(function: F) -> F:
    """Steps, solver and guidance; ``None`` leaves the choice to the bundle."""
    for option in (
        click.option(
            "--guidance", type=float, metavar="G", help="Classifier-free guidance scale; 1 is none. [bundle's default]"
        ),
        click.option(
            "--solver", metavar="NAME", help="ddim, ddpm, euler, dpmpp-2m, ... an unknown name lists them all."
        ),
        click.option("--steps", type=click.IntRange(1), metavar="N", help="Denoising steps. [bundle's default]"),
    ):
        function = option(function)
    return function
