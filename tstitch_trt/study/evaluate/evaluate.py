"""The study behind ``tstitch-trt evaluate``: pictures of many settings from the same seeds, and how good they are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_engines.progress import Progress, silent
from tstitch_trt.progress import Phases
from tstitch_trt.request.synthetic import PROMPTS, stand_in_pictures
from tstitch_trt.study.evaluate.observations import Observations
from tstitch_trt.study.evaluate.shared_prefix import draw_settings
from tstitch_trt.study.machine import describe_machine
from tstitch_trt.study.quality.resampling import LEVEL, RESAMPLES
from tstitch_trt.study.quality.scorer import Drawn, Scorer, Seen, join
from tstitch_trt.study.records import METRICS, Evaluation, Measure, Point, Setting
from tstitch_trt.study.settings import baseline_of, wishes_of
from tstitch_trt.study.store import load_studies, now, weights_of

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["Request", "evaluate", "evaluation_key", "npz_name", "prompts_for", "reads_prompts"]

_CHUNK: Final = 64  # pictures of a setting between two saves, about


@dataclass(frozen=True)
class Request:
    """What is drawn: ``samples`` pictures, number ``i`` from seed ``seed + i``, of class or prompt ``i % count``."""

    samples: int
    seed: int = 0
    prompts: tuple[str, ...] = ()

    def wishes(self, manifest: Manifest, start: int, stop: int, names: Sequence[str]) -> dict[str, Any]:
        """Keywords of ``Runtime.sample`` for pictures ``start`` to ``stop``, which the members ``names`` draw."""
        seeds = [self.seed + i for i in range(start, stop)]
        if manifest.conditioning.kind == "class":
            return {"labels": [i % manifest.conditioning.classes for i in range(start, stop)], "seeds": seeds}
        found: dict[str, Any] = {"prompt": self.texts(start, stop), "seeds": seeds}
        if any(manifest.members[name].inpaints for name in names):
            height, width = (s * manifest.decoder.factor for s in (manifest.latent.height, manifest.latent.width))
            mask = np.zeros((height, width), np.bool_)
            mask[:, : width // 2] = True
            found |= {"image": stand_in_pictures(1, height, width), "mask": mask, "strength": 1.0}
        return found

    def texts(self, start: int, stop: int) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(start, stop)]


def reads_prompts(manifest: Manifest) -> bool:
    """Whether all members of a text bundle can be given prompts."""
    texts = [member.text for member in manifest.members.values() if member.text is not None]
    needed = {name for text in texts for name in (*text.hidden, *filter(None, [text.pooled]))}
    return all(text.hidden for text in texts) and needed <= set(manifest.parts)


def prompts_for(manifest: Manifest, given: Sequence[str]) -> tuple[str, ...]:
    """The prompts of a study: those given, or made up where a text bundle needs some.

    Raises ``BadInput`` for prompts of a class bundle, ``Unavailable`` for a bundle that reads none.
    """
    if manifest.conditioning.kind == "class":
        if given:
            raise BadInput(
                f"prompts were given, and the bundle {manifest.name!r} draws classes", hint="leave out --prompts"
            )
        return ()
    if not reads_prompts(manifest):
        raise Unavailable(
            f"the bundle {manifest.name!r} has no text encoder for each of its members, so it can't read prompts",
            hint="build it from a whole pipeline folder",
        )
    return tuple(given) or PROMPTS


def evaluation_key(scorer: Scorer, request: Request, runtime: Runtime) -> str:
    """What tells one evaluation from another, however many settings and metrics it has."""
    network, reference = scorer.network, scorer.reference
    return digest(
        {
            "features": None if network is None else network.identity,
            "reference": None if reference is None else reference.sha256,
            "request": [request.samples, request.seed, list(request.prompts)],
            "backend": [runtime.backend_name, runtime.device.name],
        }
    )[:12]


def evaluate(
    runtime: Runtime,
    scorer: Scorer,
    settings: Sequence[Setting],
    request: Request,
    *,
    work: Path,
    npz: Path | None = None,
    rounds: int = 0,
    batch: int = 8,
    resamples: int = RESAMPLES,
    threads: int = 0,
    command: str,
    progress: Progress = silent,
) -> Evaluation:
    """Draws what ``work`` does not hold yet, times ``rounds`` direct runs of ``batch`` pictures, and measures.

    ``settings``: each once. ``npz``: a folder for the pictures of each setting. What an evaluation in the bundle with
    the same key knows of other settings and metrics is kept. Raises ``BadInput`` for too few samples.
    """
    if request.samples < 2:
        raise BadInput(f"{request.samples} sample; allowed is 2 or more", hint="e.g. --samples 2000")
    manifest = runtime.manifest
    asked = list({digest(setting): setting for setting in settings}.values())
    baselines = {digest(setting): baseline_of(manifest, setting) for setting in asked}
    study = _Study(runtime, scorer, request, work, npz is not None, Phases(progress), rounds)
    study.phases.phase("drawing", 0.0, 1.0, len(asked) * request.samples)
    families: dict[str, list[Setting]] = {}
    for setting in asked:
        families.setdefault(digest(baselines[digest(setting)]), []).append(setting)
    for family in families.values():
        study.draw(family, baselines[digest(family[0])])
    times = study.time(asked, batch)
    points, notes = [], list(scorer.notes(request.samples))
    for index, setting in enumerate(asked):
        study.phases.tick(0, f"measuring {setting.schedule}")
        seen = study.seen(setting, baselines[digest(setting)])
        if index == 0 and "features" in seen:
            notes = list(scorer.notes(request.samples, seen))
        name = ""
        if npz is not None:
            from tstitch_trt.images.grid import save_npz

            name = npz_name(setting)
            save_npz(npz / name, seen.pop("images"))
        taken = times[digest(setting)]
        points.append(
            Point(
                setting=setting,
                samples=request.samples,
                measures=scorer.measures(seen, resamples=resamples),
                batch=batch if taken else 0,
                ms=statistics.median(taken) if taken else 0.0,
                samples_file=name,
            )
        )
    found = Evaluation(
        bundle=manifest.name,
        weights=weights_of(manifest),
        machine=describe_machine(),
        command=command,
        made=now(),
        backend=runtime.backend_name,
        device=runtime.device.name,
        threads=threads,
        samples=request.samples,
        seed=request.seed,
        prompts=request.prompts,
        metrics=scorer.metrics,
        features={} if scorer.network is None else _network_said(scorer),
        reference={} if scorer.reference is None else _reference_said(scorer),
        level=LEVEL,
        resamples=resamples,
        baseline=baselines[digest(asked[0])],
        points=tuple(points),
        notes=tuple(notes),
    )
    return _extended(found, runtime, evaluation_key(scorer, request, runtime))


@dataclass(eq=False)
class _Study:
    runtime: Runtime
    scorer: Scorer
    request: Request
    work: Path
    keep: bool
    phases: Phases
    rounds: int

    def observations(self, setting: Setting, baseline: Setting) -> Observations:
        """What is kept of a setting. Pairs are told apart by what they were compared with."""
        wanted = {}
        for name, source in self.scorer.observed.items():
            paired = name in ("squared_error", "lpips", "latent_error")
            wanted[name] = digest([source, baseline]) if paired else source
        if self.keep:
            wanted["images"] = digest("images")
        return Observations(self._folder(setting), wanted)

    def _folder(self, setting: Setting) -> Path:
        runtime = self.runtime
        manifest = runtime.manifest
        engines = {
            name: digest([record.identity for record in network.engines if record.identity.backend == backend])
            for name, network in manifest.networks().items()
            for backend in [runtime.backend_name]
        }
        what = {
            "setting": setting,
            "seed": self.request.seed,
            "prompts": list(self.request.prompts),
            "weights": weights_of(manifest),
            "engines": engines,
            "device": runtime.device.name,
        }
        return self.work / digest(what)[:20]

    def chunks(self, setting: Setting) -> list[tuple[int, int]]:
        """Runs of pictures that fill whole engine calls."""
        guided = setting.guidance != 1 or ":g=" in setting.schedule
        whole = max(1, self.runtime.batch_limit // (2 if guided else 1))
        size = whole * max(1, _CHUNK // whole)
        return [(i, min(i + size, self.request.samples)) for i in range(0, self.request.samples, size)]

    def draw(self, family: Sequence[Setting], baseline: Setting) -> None:
        """All that is missing of settings that share steps and solver."""
        places = {digest(setting): self.observations(setting, baseline) for setting in family}
        for start, stop in self.chunks(baseline):
            missing = {}
            for setting in family:
                lacking = places[digest(setting)].lacking(start, stop - start)
                if lacking:
                    missing[digest(setting)] = lacking
                else:
                    self.phases.tick(stop - start)
            if missing:
                todo = [setting for setting in family if digest(setting) in missing]
                self._draw_chunk(todo, baseline, places, missing, start, stop)

    def _draw_chunk(
        self,
        todo: list[Setting],
        baseline: Setting,
        places: Mapping[str, Observations],
        missing: Mapping[str, list[str]],
        start: int,
        stop: int,
    ) -> None:
        manifest = self.runtime.manifest
        paired = self.scorer.paired
        if paired or baseline in todo:  # the first is drawn first: the others are compared with it
            todo = [baseline, *(setting for setting in todo if setting != baseline)]
        names = dict.fromkeys(name for setting in todo for name in setting.members)
        wishes = self.request.wishes(manifest, start, stop, list(names))
        against: Drawn | None = None
        decoding = self.keep or set(self.scorer.metrics) != {"latent_error"}
        for setting, latents in draw_settings(self.runtime, todo, wishes):
            images: NDArray[np.uint8] | None = self.runtime.decode(latents) if decoding else None
            if paired and against is None:
                against = Drawn(images, latents)
            lacking = missing.get(digest(setting))
            if lacking is None:
                continue  # the baseline, drawn again for the others
            seen: Seen = self.scorer.look(
                images,
                labels=wishes.get("labels"),
                prompts=wishes.get("prompt"),
                latents=latents,
                against=against,
                only=lacking,
            )
            if "images" in lacking:
                assert images is not None
                seen["images"] = images
            places[digest(setting)].add(start, seen)
            self.phases.tick(stop - start, f"{setting.solver} {setting.steps}: {setting.schedule}")

    def seen(self, setting: Setting, baseline: Setting) -> Seen:
        place = self.observations(setting, baseline)
        return join([place.seen(start, stop - start) for start, stop in self.chunks(baseline)])

    def time(self, settings: Sequence[Setting], batch: int) -> dict[str, list[float]]:
        """Milliseconds of direct runs by setting: all settings in turn in every round, after one that warms up."""
        places = {digest(s): Observations(self._folder(s) / f"batch-{batch}", {}) for s in settings}
        if not self.rounds:
            return {key: place.times() for key, place in places.items()}
        for setting in settings:
            if len(places[digest(setting)].times()) < self.rounds:
                self._run(setting, batch)
                break
        for index in range(self.rounds):
            for setting in settings:
                place = places[digest(setting)]
                if len(place.times()) <= index:
                    self.phases.tick(0, f"timing, round {index + 1}: {setting.schedule}")
                    place.add_time(self._run(setting, batch))
        return {key: place.times() for key, place in places.items()}

    def _run(self, setting: Setting, batch: int) -> float:
        wishes = self.request.wishes(self.runtime.manifest, 0, batch, list(setting.members))
        return self.runtime.sample(decode=False, **wishes, **wishes_of(setting)).total_ms


def npz_name(setting: Setting) -> str:
    """The file of a setting's pictures, ``ddim-50-small20-large30-g1.npz``."""
    schedule = setting.schedule.replace(":", "").replace(",", "-").replace("=", "")
    return f"{setting.solver}-{setting.steps}-{schedule}-g{setting.guidance:g}.npz"


def _network_said(scorer: Scorer) -> dict[str, str | int]:
    assert scorer.network is not None
    assert scorer.reference is not None
    return {"name": scorer.network.name, "sha256": scorer.network.sha256, "count": scorer.reference.width}


def _reference_said(scorer: Scorer) -> dict[str, str | int]:
    found = scorer.reference
    assert found is not None
    return {"name": found.name, "sha256": found.sha256, "count": found.count}


def _extended(found: Evaluation, runtime: Runtime, key: str) -> Evaluation:
    """``found`` with what an earlier evaluation of the same key and weights knows beside it."""
    earlier = next(
        (
            study
            for study in load_studies(runtime.bundle, Evaluation)
            if study.key == key and study.weights == found.weights
        ),
        None,
    )
    found = msgspec.structs.replace(found, key=key)
    if earlier is None:
        return found
    known = {digest(point.setting): point for point in earlier.points}
    points = []
    for point in found.points:
        before = known.pop(digest(point.setting), None)
        measures: dict[str, Measure] = dict(before.measures) | point.measures if before else point.measures
        timed = point if point.ms or before is None else before
        points.append(
            msgspec.structs.replace(
                point,
                measures=measures,
                ms=timed.ms,
                batch=timed.batch,
                samples_file=point.samples_file or (before.samples_file if before else ""),
            )
        )
    metrics = {*earlier.metrics, *found.metrics}
    return msgspec.structs.replace(
        found,
        points=(*points, *known.values()),
        metrics=tuple(name for name in METRICS if name in metrics),
        notes=found.notes or earlier.notes,
    )
