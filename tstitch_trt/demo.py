"""The built-in pair at several stitch points: one grid of pictures, time and quality of each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.progress import Progress
from tstitch_trt.study.evaluate.claim import Claim, Trial
from tstitch_trt.study.fractions import counts_text, draw_fractions, warm_up_fractions
from tstitch_trt.study.machine import Machine, describe_machine
from tstitch_trt.study.noninferiority import judge
from tstitch_trt.study.quality.scorer import Scorer
from tstitch_trt.study.records import MARGIN, Measure
from tstitch_trt.study.settings import setting_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["FRACTIONS", "Demo", "Point", "draw", "run"]

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One fraction. ``ms_per_image``: median over batches that fill one engine call, taken in turn with the other
    points."""

    fraction: float
    schedule: str
    members: dict[str, int]
    ms_per_image: float
    speedup: float
    accuracy: float
    frechet: float


class Demo(msgspec.Struct, frozen=True, kw_only=True):
    """``samples`` images per point. The Fréchet distance is biased upwards for few: compare the points, not papers.

    ``claim``: up to which fraction it is no worse than at the first, or that the samples are too few to say.
    """

    bundle: str
    steps: int
    solver: str
    guidance: float
    samples: int
    points: tuple[Point, ...]
    claim: str
    machine: Machine


def run(
    runtime: Runtime, *, steps: int, samples: int, guidance: float, seed: int = 0, progress: Progress
) -> tuple[Demo, list[NDArray[np.uint8]]]:
    """Draws the same ``samples`` labels and seeds at every fraction; returns the figures and each point's images,
    uint8 ``[samples,H,W,C]``, labels going round the classes."""
    classes = runtime.manifest.conditioning.classes
    labels = [i % classes for i in range(samples)]
    batch = runtime.splitting.most(guided=guidance != 1)
    scorer = Scorer.of(runtime.bundle, ("fid", "accuracy"))
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance}
    warm_up_fractions(runtime, {"labels": labels[:batch], **settings})
    batches = []
    for start in range(0, samples, batch):
        part = labels[start : start + batch]

        def tell(text: str, share: float, start: int = start, count: int = len(part)) -> None:
            progress(text, (start + share * count) / samples)

        batches.append([*draw_fractions(runtime, FRACTIONS, {"labels": part, "seed": seed + start}, settings, tell)])
    rows = [*zip(*batches, strict=True)]  # the batches of each fraction
    pictures = [np.concatenate([part.images for part in row]) for row in rows]
    costs = [statistics.median(part.ms for part in row) for row in rows]
    points, distances = [], []
    for (first, *_), cost, drawn_images in zip(rows, costs, pictures, strict=True):
        features = scorer.extract(drawn_images, labels=labels)
        frechet, accuracy = (scorer.measure(features, name) for name in ("fid", "accuracy"))
        distances.append(frechet)
        points.append(
            Point(
                fraction=first.fraction,
                schedule=first.result.schedule.text,
                members=first.result.schedule.counts,
                ms_per_image=cost,
                speedup=costs[0] / cost,
                accuracy=accuracy.value,
                frechet=frechet.value,
            )
        )
    figures = Demo(
        bundle=runtime.manifest.name,
        steps=steps,
        solver=rows[0][0].result.plan.solver.name,
        guidance=guidance,
        samples=samples,
        points=tuple(points),
        claim=_claim(runtime, points, distances, settings, samples),
        machine=describe_machine(),
    )
    return figures, pictures


def _claim(
    runtime: Runtime, points: Sequence[Point], distances: Sequence[Measure], settings: Mapping[str, Any], samples: int
) -> str:
    """The first point is the last member alone."""
    names = list(runtime.manifest.members)
    alone = setting_of(runtime.manifest, schedule=points[0].schedule, **settings)
    trials = [
        Trial(
            fraction=point.fraction,
            schedule=point.schedule,
            judgement=judge("fid", distance, distances[0], samples=samples, margin=MARGIN),
            speedup=point.speedup,
        )
        for point, distance in zip(points[1:], distances[1:], strict=True)
    ]
    return Claim.of("fid", alone, trials, samples=samples, margin=MARGIN).text(names[0], names[-1], "distance")


def draw(figures: Demo, pictures: Sequence[NDArray[np.uint8]], names: Sequence[str]) -> Image:
    """Rows: the fractions with their figures. Columns: the first image of every class, the same seeds in each row."""
    from tstitch_trt.images.grid import labelled_rows

    columns = min(figures.samples, len(names))
    rows = []
    for point, images in zip(figures.points, pictures, strict=True):
        text = (
            f"{point.fraction:.0%} small: {counts_text(point.members)}\n"
            f"{point.ms_per_image:.0f} ms per image, x{point.speedup:.2f}\n"
            f"accuracy {point.accuracy:.1%}, distance {point.frechet:.2f}"  # Pillow's own font has no é
        )
        rows.append((text, images[:columns]))
    return labelled_rows(rows, heads=names[:columns], scale=max(1, 84 // pictures[0].shape[1]))
