"""The figures of a report, each from one study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tstitch_trt.plots.markup import Markup
from tstitch_trt.plots.svg import GROUND, INK, MUTED, Drawing, drawing, series_colour
from tstitch_trt.plots.words import METRIC_NAMES, family_of, interval, metric_axis, ms, order_of
from tstitch_trt.study.records import (
    Check,
    Divergence,
    Evaluation,
    OrderTrial,
    Point,
    Search,
    SearchPoint,
    Setting,
)

__all__ = ["checks_figure", "divergence_figure", "orders_figure", "quality_figure", "search_figure", "share_of"]

WIDE, NARROW = (11.0, 4.4), (5.6, 4.0)  # inches: the width of the page, half of it

_MARKERS: Final = ("o", "s", "D", "^", "v", "P", "X", "<")


def share_of(setting: Setting, member: str) -> float:
    """The share of the rows that ``member`` runs."""
    return setting.members.get(member, 0) / setting.rows


def quality_figure(
    name: str,
    evaluation: Evaluation,
    metric: str,
    *,
    first: str,
    last: str,
    wide: bool = True,
    chosen: Point | None = None,
) -> Markup | None:
    """``metric`` against the milliseconds per image, with intervals: one line per family of settings.

    The band is the interval of ``last`` alone at its most steps. ``chosen`` is ringed. ``None`` where no point was
    timed.
    """
    timed = [point for point in evaluation.points if metric in point.measures and point.ms and point.batch]
    if not timed:
        return None
    title = f"{METRIC_NAMES.get(metric, metric)} against time per image"
    with drawing(name, title, size=WIDE if wide else NARROW) as made:
        axes = made.axes
        notes = []
        alone = [point for point in timed if order_of(point.setting) == (last,)]
        if alone:
            base = max(alone, key=lambda point: point.setting.rows).measures[metric]
            axes.axhspan(base.low, base.high, color=MUTED, alpha=0.13, linewidth=0, label=f"interval of {last} alone")
        for index, (label, points) in enumerate(_families(timed, first=first, last=last).items()):
            colour, marker = series_colour(index), _MARKERS[index % len(_MARKERS)]
            x = [point.ms / point.batch for point in points]
            y = [point.measures[metric] for point in points]
            errors = [[m.value - m.low for m in y], [m.high - m.value for m in y]]
            stitched = any(len(order_of(point.setting)) > 1 for point in points)
            axes.errorbar(
                x,
                [m.value for m in y],
                errors,
                color=colour,
                marker=marker,
                linestyle="-" if len(points) > 2 else "none",
                capsize=2.5,
                elinewidth=1,
                label=label,
                zorder=3,
            )
            for point, across, measure in zip(points, x, y, strict=True):
                said = f"{point.setting.schedule}, {point.setting.steps} {point.setting.solver} steps"
                text = f"{said}: {ms(across)} ms per image, {METRIC_NAMES.get(metric, metric)} {interval(measure)}"
                made.point(across, measure.value, text, color=colour, marker=marker, zorder=4)
                short = f"{share_of(point.setting, first):.0%}" if stitched else f"{point.setting.steps} steps"
                notes.append((across, measure.value, short, stitched))
        if chosen is not None and chosen.ms and chosen.batch:
            _ring(made, chosen.ms / chosen.batch, chosen.measures[metric].value, chosen.setting)
        batches = sorted({point.batch for point in timed})
        axes.set_xlabel(f"ms per image, batch of {' or '.join(map(str, batches))}")
        axes.set_ylabel(metric_axis(metric))
        axes.margins(x=0.06, y=0.12)
        axes.set_xlim(left=0)
        if wide:
            _write(made, notes)
        _legend(made)
    return made.markup


def search_figure(name: str, search: Search, *, chosen: SearchPoint | None = None) -> Markup | None:
    """All that was tried: cost against quality, the front as a line. ``chosen`` is ringed. ``None`` without points."""
    if not search.points:
        return None
    title = f"The search: {METRIC_NAMES.get(search.metric, search.metric)} against predicted time"
    with drawing(name, title, size=WIDE) as made:
        axes = made.axes
        kinds = list(dict.fromkeys(point.kind for point in search.points))
        front = sorted((p for p in search.points if p.front), key=lambda p: p.cost_ms)
        x = [point.cost_ms for point in front]
        axes.plot(x, [p.quality.value for p in front], color=INK, linewidth=1.3, label="Pareto front", zorder=2)
        for index, kind in enumerate(kinds):
            colour, marker = series_colour(index), _MARKERS[index % len(_MARKERS)]
            axes.plot([], [], color=colour, marker=marker, linestyle="none", label=kind)
            for point in (p for p in search.points if p.kind == kind):
                said = f"{point.setting.schedule}, {point.setting.steps} {point.setting.solver} steps"
                text = (
                    f"{said}: {ms(point.cost_ms)} ms predicted, {interval(point.quality)} on {point.samples} samples"
                    f"{', dropped early' if point.dropped else ''}{', on the front' if point.front else ''}"
                )
                style = {"color": colour} if point.front else {"color": colour, "markerfacecolor": GROUND}
                made.point(
                    point.cost_ms, point.quality.value, text, marker=marker, alpha=0.45 if point.dropped else 1, **style
                )
            kept = [p for p in search.points if p.kind == kind and p.front]
            y = [p.quality for p in kept]
            axes.errorbar(
                [p.cost_ms for p in kept],
                [m.value for m in y],
                [[m.value - m.low for m in y], [m.high - m.value for m in y]],
                color=colour,
                linestyle="none",
                elinewidth=1,
                capsize=2.5,
            )
        if chosen is not None:
            _ring(made, chosen.cost_ms, chosen.quality.value, chosen.setting)
        axes.set_xlabel(f"predicted ms for a batch of {search.batch}")
        axes.set_ylabel(metric_axis(search.metric))
        axes.margins(x=0.06, y=0.12)
        axes.set_xlim(left=0)
        _legend(made)
    return made.markup


def divergence_figure(name: str, divergence: Divergence) -> Markup:
    """Relative L2 of each member's denoised estimate from the reference's, step by step, p10 to p90 shaded."""
    with drawing(name, f"Divergence from {divergence.reference} per step", size=WIDE) as made:
        axes = made.axes
        for index, (member, steps) in enumerate(divergence.members.items()):
            colour, marker = series_colour(index), _MARKERS[index % len(_MARKERS)]
            x = [step.step for step in steps]
            axes.fill_between(
                x, [step.p10 for step in steps], [step.p90 for step in steps], color=colour, alpha=0.18, linewidth=0
            )
            axes.plot(x, [step.rel_l2 for step in steps], color=colour, label=member)
            for step in steps:
                text = (
                    f"{member}, step {step.step} (timestep {step.timestep:g}): relative L2 {step.rel_l2:.3g}, "
                    f"cosine {step.cosine:.4f}"
                )
                made.point(step.step, step.rel_l2, text, color=colour, marker=marker, markersize=4)
        axes.set_xlabel(f"step of {divergence.steps}, noisiest first")
        axes.set_ylabel(f"relative L2 from {divergence.reference}")
        axes.margins(x=0.02)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(made)
    return made.markup


def orders_figure(name: str, orders: Sequence[OrderTrial]) -> Markup:
    """The final latents' error of each schedule that was run, as bars with p10 to p90."""
    kinds = list(dict.fromkeys(trial.order for trial in orders))
    height = 0.9 + 0.3 * len(orders)
    with drawing(name, "Error of the final latents by order of the members", size=(WIDE[0], height)) as made:
        axes = made.axes
        axes.grid(visible=False, axis="y")
        for row, trial in enumerate(orders):
            colour = series_colour(kinds.index(trial.order))
            (bar,) = axes.barh([row], [trial.latent_error], height=0.62, color=colour, alpha=0.85)
            made.tip(
                bar, f"{trial.order}, {trial.schedule}: {trial.latent_error:.3g} ({trial.p10:.3g}–{trial.p90:.3g})"
            )
            axes.plot([trial.p10, trial.p90], [row, row], color=INK, linewidth=1.1)
        axes.set_yticks(range(len(orders)), [f"{trial.schedule}" for trial in orders])
        for kind in kinds if len(kinds) > 1 else ():
            axes.barh([0], [0], color=series_colour(kinds.index(kind)), alpha=0.85, label=kind)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("relative L2 of the final latents")
        _legend(made)
    return made.markup


def checks_figure(name: str, checks: Sequence[Check]) -> Markup:
    """Predicted against measured time of schedules that the model was not fitted on; the line is equality."""
    with drawing(name, "Predicted against measured time", size=NARROW) as made:
        axes = made.axes
        most = max(max(check.predicted_ms, check.measured_ms) for check in checks) * 1.06
        least = min(min(check.predicted_ms, check.measured_ms) for check in checks) / 1.06
        wide = most / least > 30
        if wide:
            axes.set_xscale("log")
            axes.set_yscale("log")
        low = least if wide else 0
        axes.fill_between(
            [low, most], [low * 0.95, most * 0.95], [low * 1.05, most * 1.05], color=MUTED, alpha=0.13, linewidth=0,
            label="within 5 %",
        )  # fmt: skip
        axes.plot([low, most], [low, most], color=MUTED, linewidth=1, label="equal")
        for check in checks:
            text = (
                f"{check.schedule}, {check.steps} steps, batch {check.batch}: predicted {ms(check.predicted_ms)} ms, "
                f"measured {ms(check.measured_ms)} ms ({check.error:+.1%})"
            )
            made.point(check.measured_ms, check.predicted_ms, text, color=series_colour(0), alpha=0.85)
        axes.set_xlim(low, most)
        axes.set_ylim(low, most)
        axes.set_xlabel("measured ms")
        axes.set_ylabel("predicted ms")
        _legend(made)
    return made.markup


def _families(points: Sequence[Point], *, first: str, last: str) -> dict[str, list[Point]]:
    """Points by family, in the order of their cost. The ends of a family of fractions, ``first`` and ``last`` alone at
    the same steps, belong to it; ``last`` alone at several step counts is a family too: plain step reduction."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(family_of(point.setting), []).append(point)
    stitched = {label: kept for label, kept in groups.items() if len(order_of(kept[0].setting)) > 1}
    alone = {label: kept for label, kept in groups.items() if label not in stitched}
    taken: set[int] = set()
    for kept in stitched.values():
        if order_of(kept[0].setting) == (first, last):
            ends = [p for group in alone.values() for p in group if _end_of(p.setting, kept[0].setting)]
            kept += ends
            taken |= {id(point) for point in ends}
    for label, kept in alone.items():
        several = len({point.setting.steps for point in kept}) > 1
        if several or not all(id(point) in taken for point in kept):
            named = f"{label}, fewer steps" if several and order_of(kept[0].setting) == (last,) else label
            stitched[named] = kept
    return {label: sorted(kept, key=lambda p: p.ms / p.batch) for label, kept in stitched.items()}


def _end_of(setting: Setting, family: Setting) -> bool:
    return (
        len(order_of(setting)) == 1
        and next(iter(setting.members)) in family.members
        and (setting.steps, setting.solver, setting.guidance) == (family.steps, family.solver, family.guidance)
        and setting.plan == family.plan
    )


def _ring(made: Drawing, x: float, y: float, setting: Setting) -> None:
    style = {"color": INK, "markerfacecolor": "none", "markersize": 13, "markeredgewidth": 1.6}
    made.point(x, y, f"chosen: {setting.schedule}, {setting.steps} steps", **style, label="chosen", zorder=5)


def _write(made: Drawing, notes: Sequence[tuple[float, float, str, bool]]) -> None:
    """Texts beside points, to the upper right or (``below``) to the lower left; one that would lie on another is left
    out."""
    axes = made.axes
    axes.figure.draw_without_rendering()  # limits and layout are settled by drawing
    placed: list[tuple[float, float, float]] = []
    for x, y, text, below in notes:
        across, up = 0.72 * axes.transData.transform((x, y))  # pixels are 1/100 inch, points 1/72
        width = 5.2 * len(text)
        across, up = (across - width, up - 12) if below else (across, up + 5)
        if all(across > a + w or a > across + width or abs(up - b) > 10 for a, b, w in placed):
            placed.append((across, up, width))
            axes.annotate(
                text,
                (x, y),
                xytext=(-4, -11) if below else (5, 5),
                textcoords="offset points",
                ha="right" if below else "left",
                color=MUTED,
                fontsize=8,
                zorder=5,
            )


def _legend(made: Drawing) -> None:
    """Above the axes, in as many columns as the figure has room for."""
    handles, labels = made.axes.get_legend_handles_labels()
    if len(handles) > 1:
        room = made.axes.figure.get_figwidth() * 72
        columns = max(1, int(room / (40 + 5.6 * max(map(len, labels)))))
        made.axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6)
