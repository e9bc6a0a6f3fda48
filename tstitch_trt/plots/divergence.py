"""The plots of a profile: how far members are apart at each step, and what orders of them add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstitch_trt.plots.figure import MUTED, figure, point, series
from tstitch_trt.study.records import Divergence

__all__ = ["draw_divergence", "draw_orders", "plot_divergence"]


def plot_divergence(path: Path, study: Divergence) -> None:
    """Divergence per step on the left, final latent error of the orders on the right, as one PNG."""
    with figure(path, columns=2, size=(12.0, 4.4)) as (left, right):
        draw_divergence(left, study)
        left.set_title(
            f"{study.bundle}: distance from {study.reference}, {len(study.seeds)} seeds, guidance {study.guidance:g}"
        )
        draw_orders(right, study)
        right.set_title(f"{study.steps} {study.solver} steps; suggested: {study.suggested}")


def draw_divergence(axes: Any, study: Divergence) -> None:
    """Both measures per step: relative L2 with p10 to p90 shaded on the left scale, the cosine on the right one."""
    other = axes.twinx()
    other.grid(visible=False)
    for index, (name, steps) in enumerate(study.members.items()):
        look = series(index)
        x, colour = [step.step + 1 for step in steps], look["color"]
        axes.plot(x, [step.rel_l2 for step in steps], color=colour, label=f"{name}: relative L2 (median, p10 to p90)")
        axes.fill_between(x, [s.p10 for s in steps], [s.p90 for s in steps], color=colour, alpha=0.18, linewidth=0)
        other.plot(x, [1 - s.cosine for s in steps], "--", color=colour, linewidth=1)
        axes.plot([], [], "--", color=colour, linewidth=1, label=f"{name}: 1 - cosine")  # one legend for both scales
        for s in steps:
            text = (
                f"{name}, step {s.step + 1} (timestep {s.timestep:g}): relative L2 {s.rel_l2:.3g}, "
                f"cosine {s.cosine:.4f}"
            )
            point(axes, s.step + 1, s.rel_l2, text, **look, markersize=4)
    axes.set_xlabel(f"step of {study.steps} of {study.reference}'s trajectory, noisiest first")
    axes.set_ylabel(f"relative L2 from {study.reference}")
    other.set_ylabel("1 - cosine")
    for scale in (axes, other):
        scale.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_orders(axes: Any, study: Divergence) -> None:
    """The error of the final latents against the share of steps on the small member, one line an order."""
    for index, order in enumerate(dict.fromkeys(t.order for t in study.orders if t.order != "small-only")):
        look = series(index)
        trials = sorted((t for t in study.orders if t.order == order), key=lambda t: t.share)
        x = [t.share for t in trials]
        errors = [[max(t.latent_error - t.p10, 0) for t in trials], [max(t.p90 - t.latent_error, 0) for t in trials]]
        label = f"{order} (best)" if order == study.order else order
        axes.errorbar(x, [t.latent_error for t in trials], errors, **look, capsize=3, elinewidth=1, label=label)
        for t in trials:
            text = f"{order}, {t.schedule}: {t.latent_error:.3g} ({t.p10:.3g}–{t.p90:.3g})"
            point(axes, t.share, t.latent_error, text, **look)
    for alone in (t for t in study.orders if t.order == "small-only"):
        axes.plot([0, 1], [0, alone.latent_error], ":", color=MUTED, label="equal share of steps and error")
    axes.set_xlabel("share of the steps on the small member")
    axes.set_ylabel(f"relative L2 of the final latents from {study.reference}'s")
    axes.set_ylim(bottom=0)
