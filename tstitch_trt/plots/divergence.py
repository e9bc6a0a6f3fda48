"""The plot of a profile: how far members are apart at each step, and what orders of them add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstitch_trt.plots.figure import figure
from tstitch_trt.study.divergence.orders import MEMBER_ORDERS
from tstitch_trt.study.records import Divergence

__all__ = ["draw_divergence", "draw_orders", "plot_divergence"]


def plot_divergence(path: Path, study: Divergence) -> None:
    """Divergence per step on the left, final latent error of the orders on the right, as one PNG."""
    with figure(path, columns=2, size=(12.0, 4.4)) as (left, right):
        draw_divergence(left, study)
        draw_orders(right, study)


def draw_divergence(axes: Any, study: Divergence) -> None:
    """Both measures per step: relative L2 with its spread on the left scale, the cosine on the right one."""
    other = axes.twinx()
    for index, (name, steps) in enumerate(study.members.items()):
        x, colour = [step.step + 1 for step in steps], f"C{index}"
        axes.plot(x, [step.rel_l2 for step in steps], color=colour, label=f"{name}: relative L2 (median, p10 to p90)")
        axes.fill_between(x, [s.p10 for s in steps], [s.p90 for s in steps], color=colour, alpha=0.2, linewidth=0)
        other.plot(x, [1 - s.cosine for s in steps], "--", color=colour, label=f"{name}: 1 - cosine")
    axes.set_xlabel(f"step of {study.reference}'s trajectory (1 is the noisiest)")
    axes.set_ylabel("relative L2 of the denoised estimates")
    other.set_ylabel("1 - cosine")
    axes.set_ylim(bottom=0)
    other.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(
        f"{study.bundle}: distance from {study.reference}, {len(study.seeds)} seeds, guidance {study.guidance:g}"
    )
    axes.grid(alpha=0.3)
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], fontsize="small")


def draw_orders(axes: Any, study: Divergence) -> None:
    """The error of the final latents against the share of steps on the small member, one line an order."""
    for index, order in enumerate(MEMBER_ORDERS):
        trials = sorted((t for t in study.orders if t.order == order), key=lambda t: t.share)
        if not trials:
            continue
        errors = [[t.latent_error - t.p10 for t in trials], [t.p90 - t.latent_error for t in trials]]
        axes.errorbar(
            [t.share for t in trials],
            [t.latent_error for t in trials],
            errors,
            marker="o",
            capsize=3,
            color=f"C{index}",
            label=f"{order} (best)" if order == study.order else order,
        )
    alone = [t for t in study.orders if t.order == "small-only"]
    for trial in alone:
        axes.plot([0, 1], [0, trial.latent_error], ":", color="grey", label="equal share of steps and error")
    axes.set_xlabel("share of the steps on the small member")
    axes.set_ylabel(f"relative L2 of the final latents from {study.reference}'s")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{study.steps} {study.solver} steps; suggested: {study.suggested}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize="small")
