"""Quality and time of the built-in pair at every stitch point, in both orders.

    tstitch-trt build fashion -o build/fashion.bundle
    python benchmarks/quality.py build/fashion.bundle

Draws the same labels and seeds at fractions 0, 0.1 ... 1 with the small member first (T-Stitch) and with the large
member first, and writes the Fréchet distance (in the features of the bundle's own classifier, against held-out real
images), the class accuracy and the time per image to ``quality.json``, ``quality.png`` and ``quality.md``. Stop it at
any time: the same command goes on from the last finished batch of a point. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import tstitch_trt
from tstitch_engines.errors import BadInput, FailedWork, TStitchError
from tstitch_engines.identity import digest, model_digest
from tstitch_trt.bench import spread
from tstitch_trt.curve import ORDERS, StitchPoint, draw_points, stitch_points
from tstitch_trt.files import atomic_file, write_text
from tstitch_trt.machine import describe_machine
from tstitch_trt.plots import check_plot, figure
from tstitch_trt.progress import log, progress
from tstitch_trt.quality import QualityMeter, frechet_distance, gaussian_of

FRACTIONS = tuple(i / 10 for i in range(11))
CHUNK = 160  # samples between two saves; a multiple of every usual batch limit
RESAMPLES = 20


class Seen:
    """What the quality network saw of one point so far: features and logits of its first samples, on disk."""

    def __init__(self, folder: Path, point: StitchPoint) -> None:
        self.path = folder / f"{point.order}-{point.fraction:.2f}.npz"
        self.features = self.logits = np.zeros((0, 0), np.float32)
        if self.path.is_file():
            with np.load(self.path, allow_pickle=False) as stored:
                self.features, self.logits = stored["features"], stored["logits"]

    def __len__(self) -> int:
        return len(self.features)

    def add(self, features: NDArray[np.float32], logits: NDArray[np.float32]) -> None:
        self.features = np.concatenate([self.features, features]) if len(self) else features
        self.logits = np.concatenate([self.logits, logits]) if len(self.logits) else logits
        with atomic_file(self.path) as file:
            np.savez(file, features=self.features, logits=self.logits)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--samples", type=int, default=2000, help="images per point (default 2000)")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale (default 1, none)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of engines and classifier (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", default="small", help="name of the small member")
    parser.add_argument("--large", default="large", help="name of the large member")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality")
    parser.add_argument("--scratch", type=Path, default=Path("build/quality"), help="unfinished work is kept here")
    args = parser.parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        log("interrupted: the same command goes on from here")
        return 130
    except TStitchError as error:
        log(f"error: {error}")
        return error.exit_code
    return 0


def run(args: argparse.Namespace) -> None:
    if args.samples < 2 or args.repeats < 1:
        raise BadInput(
            f"--samples {args.samples} --repeats {args.repeats}; allowed are 2 and 1 or more",
            hint="leave them out for 2000 and 5",
        )
    args.out.mkdir(parents=True, exist_ok=True)
    check_plot(args.out / "quality.png", option="--out")
    with tstitch_trt.load(args.bundle, device=args.device, threads=args.threads) as runtime:
        manifest = runtime.manifest
        meter = QualityMeter.of(runtime.bundle, threads=args.threads or 0)
        settings = {"solver": "ddim", "guidance": args.guidance}
        points = stitch_points(FRACTIONS, args.steps, small=args.small, large=args.large)
        weights = {name: model_digest(member.onnx) for name, member in manifest.members.items()}
        what = {"steps": args.steps, "seed": args.seed, **settings, "weights": weights, "fractions": FRACTIONS}
        folder = args.scratch / digest(what)[:16]
        folder.mkdir(parents=True, exist_ok=True)

        classes = manifest.conditioning.classes
        labels = [i % classes for i in range(args.samples)]
        seeds = [args.seed + i for i in range(args.samples)]
        verify(runtime, points, labels[:4], seeds[:4], settings)
        seen = sample(runtime, meter, points, labels, seeds, settings, folder)
        times = measure(runtime, points, args, settings, folder)

        document = {
            "bundle": manifest.name,
            "weights": weights,
            "versions": manifest.versions,
            "command": "python benchmarks/quality.py " + " ".join(sys.argv[1:]),
            "samples": args.samples,
            "steps": args.steps,
            **settings,
            "seed": args.seed,
            "reference_images": meter.reference.count,
            "machine": msgspec.to_builtins(describe_machine()),
            "timed_batch": times["batch"],
            "timed_rounds": args.repeats,
            "points": [
                row(point, seen[index], labels, meter, times["ms"][index], times["ms"][0])
                for index, point in enumerate(points)
            ],
        }
    write_text(args.out / "quality.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    write_text(args.out / "quality.md", markdown(document))
    plot(args.out / "quality.png", document)
    print(markdown(document), end="")


def verify(
    runtime: tstitch_trt.Runtime,
    points: list[StitchPoint],
    labels: list[int],
    seeds: list[int],
    settings: dict[str, Any],
) -> None:
    """The shared walk must give the very latents of each point alone, or the numbers are of something else."""
    shared = draw_points(runtime, points, labels=labels, seeds=seeds, **settings)
    with progress("comparing shared and direct runs", len(points), counted="points") as bar:
        for point, latents in shared:
            direct = runtime.sample(
                labels=labels, seeds=seeds, steps=point.steps, schedule=point.schedule, decode=False, **settings
            )
            if not np.array_equal(direct.latents, latents):
                raise FailedWork(
                    f"{point.schedule}: the shared walk gives other latents than a direct run",
                    hint="report this: the runtime's start_step is not exact",
                )
            bar.advance()


def sample(
    runtime: tstitch_trt.Runtime,
    meter: QualityMeter,
    points: list[StitchPoint],
    labels: list[int],
    seeds: list[int],
    settings: dict[str, Any],
    folder: Path,
) -> list[Seen]:
    """Draws what is not there yet, chunk by chunk, and saves every point's share of a chunk at once."""
    seen = [Seen(folder, point) for point in points]
    done = sum(min(len(s), len(labels)) for s in seen)
    if done:
        log(f"going on after {done} of {len(points) * len(labels)} images in {folder}")
    with progress("drawing", len(points) * len(labels), counted="images") as bar:
        for start in range(0, len(labels), CHUNK):
            stop = min(start + CHUNK, len(labels))
            missing = [(p, s) for p, s in zip(points, seen, strict=True) if len(s) < stop]
            bar.update(done=sum(min(len(s), len(labels)) for s in seen))
            found = dict(missing)
            drawn = draw_points(runtime, list(found), labels=labels[start:stop], seeds=seeds[start:stop], **settings)
            for point, latents in drawn:
                record = found[point]
                features, logits = meter.look(runtime.decode(latents))
                record.add(features[len(record) - start :], logits[len(record) - start :])
                bar.update(done=sum(min(len(s), len(labels)) for s in seen), text=f"{point.order} {point.fraction:g}")
    return seen


def measure(
    runtime: tstitch_trt.Runtime,
    points: list[StitchPoint],
    args: argparse.Namespace,
    settings: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Milliseconds of full direct runs of one batch, all points in turn in every round; the first round warms up."""
    batch = runtime.batch_limit // (1 if args.guidance == 1 else 2)
    path = folder / "times.json"
    times: dict[str, Any] = {"batch": batch, "ms": [[] for _ in points]}
    if path.is_file():
        times = json.loads(path.read_text())
    labels = [i % runtime.manifest.conditioning.classes for i in range(batch)]
    with progress("timing", args.repeats * len(points), counted="runs") as bar:
        runtime.sample(labels=labels, steps=args.steps, schedule=points[0].schedule, decode=False, **settings)
        for index in range(min(map(len, times["ms"])), args.repeats):
            for point, taken in zip(points, times["ms"], strict=True):
                bar.update(text=f"timing round {index + 1}")
                run = runtime.sample(labels=labels, steps=args.steps, schedule=point.schedule, decode=False, **settings)
                taken.append(run.total_ms)
                bar.advance()
            write_text(path, json.dumps(times))
    return times


def row(
    point: StitchPoint,
    seen: Seen,
    labels: list[int],
    meter: QualityMeter,
    ms: list[float],
    first_ms: list[float],
) -> dict[str, Any]:
    count = len(labels)
    features, logits = seen.features[:count], seen.logits[:count]
    score = meter.score(features, logits, labels)
    generator = np.random.default_rng(0)
    again = [
        frechet_distance(gaussian_of(features[generator.integers(0, count, count)]), meter.reference)
        for _ in range(RESAMPLES)
    ]
    middle, low, high = spread(ms)
    return {
        "order": point.order,
        "fraction": point.fraction,
        "schedule": point.schedule,
        "members": point.members,
        "frechet": score.frechet,
        "frechet_std": float(np.std(again, ddof=1)),
        "accuracy": score.accuracy,
        "ms": middle,
        "p10_ms": low,
        "p90_ms": high,
        "speedup": float(np.median([a / b for a, b in zip(first_ms, ms, strict=True)])),
    }


def markdown(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        f"{document['samples']} samples per point, {document['steps']} DDIM steps, guidance {document['guidance']:g}; "
        f"Fréchet distance to {document['reference_images']} held-out images in the classifier's features "
        "(± standard deviation over bootstrap resamples); time of one batch of "
        f"{document['timed_batch']} images, median of {document['timed_rounds']} rounds, on {machine['processor']}, "
        f"{machine['cores']} cores.",
        "",
        "| order | small's share | Fréchet distance | class accuracy | ms per batch | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p['order']} | {p['fraction']:.0%} | {p['frechet']:.3f} ± {p['frechet_std']:.3f} | {p['accuracy']:.2%} "
        f"| {p['ms']:.0f} | {p['speedup']:.2f} |"
        for p in document["points"]
    ]
    return "\n".join(lines) + "\n"


def plot(path: Path, document: dict[str, Any]) -> None:
    """Distance against small's share, distance against time, and class accuracy against small's share."""
    panels = (
        ("fraction", "frechet", "small member's share of the steps", "Fréchet distance (lower is better)"),
        ("ms", "frechet", f"ms per batch of {document['timed_batch']} images", "Fréchet distance (lower is better)"),
        ("fraction", "accuracy", "small member's share of the steps", "class accuracy"),
    )
    with figure(path, columns=len(panels), size=(15, 4.4)) as axes:
        for axis, (x, y, x_label, y_label) in zip(axes, panels, strict=True):
            for order, style in zip(ORDERS, ("o-", "s--"), strict=True):
                rows = [p for p in document["points"] if p["order"] == order]
                errors = [p["frechet_std"] for p in rows] if y == "frechet" else None
                axis.errorbar([p[x] for p in rows], [p[y] for p in rows], errors, fmt=style, capsize=3, label=order)
            axis.set_xlabel(x_label)
            axis.set_ylabel(y_label)
            axis.grid(alpha=0.3)
            axis.legend()
        axes[1].set_title(
            f"{document['bundle']}: {document['samples']} samples per point, {document['steps']} DDIM steps, "
            f"guidance {document['guidance']:g}"
        )


if __name__ == "__main__":
    sys.exit(main())
