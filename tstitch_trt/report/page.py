"""The page as a whole: what ``page.html`` is filled with. It asks nothing of the network and needs no JavaScript."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import Manifest, Member
from tstitch_engines.version import VERSION
from tstitch_trt.plots.calibration import draw_checks
from tstitch_trt.plots.divergence import draw_divergence, draw_orders
from tstitch_trt.plots.search import draw_search
from tstitch_trt.plots.svg import NARROW, svg
from tstitch_trt.plots.templates import fill, stylesheet
from tstitch_trt.plots.words import METRIC_NAMES, date, machine_text
from tstitch_trt.report.quality import quality_of
from tstitch_trt.report.samples import SampleTable, png_url
from tstitch_trt.study.divergence.orders import FEW_SEEDS
from tstitch_trt.study.evaluate.claim import claims_of
from tstitch_trt.study.gather import Studies, by_metric
from tstitch_trt.study.machine import Machine
from tstitch_trt.study.records import PAIRED
from tstitch_trt.study.store import weights_of

__all__ = ["Page", "render"]


@dataclass(frozen=True)
class Page:
    """``path``: the bundle as it was named. ``reason``: why there are no ``samples``. ``command``: makes this page
    again. ``made``: when, ISO 8601 in UTC."""

    path: str
    studies: Studies
    samples: SampleTable | None
    reason: str
    command: str
    made: str
    machine: Machine


def render(bundle: Bundle, page: Page) -> str:
    """The HTML. Raises ``Unavailable`` where there are plots to draw and no matplotlib."""
    manifest, studies = bundle.manifest, page.studies
    members = list(manifest.members)
    first, last = members[0], members[-1]
    when = f"{page.made[:10]} {page.made[11:16]} UTC"
    words = {"sample": ("-o", "samples.png"), **dict.fromkeys(("evaluate", "search", "profile", "calibrate"), ())}
    return fill(
        "report/page.html",
        page=page,
        manifest=manifest,
        studies=studies,
        samples=page.samples,
        first=first,
        when=when,
        version=VERSION,
        style=stylesheet("tstitch_trt.report"),
        weights={name: _weight(member) for name, member in manifest.members.items()},
        cards=list(_cards(studies, first, last)),
        notes=list(_warnings(studies, page.machine)),
        commands={word: shlex.join(("tstitch-trt", word, page.path, *more)) for word, more in words.items()},
        quality=quality_of(studies, first, last),
        tried=next((study for study in studies.divergences if study.orders), None),
        plots=_plots(studies),
        bundle={"facts": _facts(manifest, page.path), "members": _members(manifest)},
        machines=_machines(studies, page.machine, when),
        png_url=png_url,
        paired=PAIRED,
    ) + "\n"  # fmt: skip


def _plots(studies: Studies) -> dict[str, Markup | list[Markup | None] | None]:
    """The drawings of the search and the divergence with the most samples, of its orders, and of each calibration's
    checks."""
    found: dict[str, Markup | list[Markup | None] | None] = {"search": None}
    for search in studies.searches[:1]:
        if search.points:
            title = f"The search: {METRIC_NAMES.get(search.metric, search.metric)} against predicted time"
            found["search"] = svg("search-0", title, partial(draw_search, study=search))
    for study in studies.divergences[:1]:
        title = f"Divergence from {study.reference} per step"
        found["divergence"] = svg("divergence-0", title, partial(draw_divergence, study=study))
    for tried in [study for study in studies.divergences if study.orders][:1]:
        title = "Error of the final latents by order of the members"
        found["orders"] = svg("orders-0", title, partial(draw_orders, study=tried))
    title = "Predicted against measured time"
    found["checks"] = [
        svg(f"checks-{index}", title, partial(draw_checks, calibration=study), size=NARROW) if study.checks else None
        for index, study in enumerate(studies.calibrations)
    ]
    return found


def _cards(studies: Studies, first: str, last: str) -> Iterator[tuple[str, str]]:
    """The few numbers that answer "why this fraction?", as far as they were measured."""
    for metric, evaluation in by_metric(studies.evaluations).items():
        claims = [claim for claim in claims_of(evaluation, (first, last), metric) if claim.fraction is not None]
        for found in sorted(claims, key=lambda claim: -claim.setting.rows)[:1]:
            name = METRIC_NAMES.get(metric, metric)
            text = (
                f"of the steps on {first} with {name} no worse than {last} alone (margin {found.margin:.0%}, "
                f"{found.samples:,} samples)"
            )
            yield f"{found.fraction:.0%}", text
            if found.speedup:
                yield f"{found.speedup:.2f}×", f"as fast there as {last} alone"
        if claims:
            break
    for study in studies.divergences[:1]:
        if len(study.seeds) >= FEW_SEEDS:
            text = f"suggested by {len(study.seeds):,} seeds' divergence from {study.reference}, order {study.order}"
            yield study.suggested, text
    for calibration in studies.calibrations[:1]:
        if calibration.checks:
            text = (
                f"median error of the predicted times of {len(calibration.checks):,} schedules, "
                f"worst {calibration.worst_error:.1%}"
            )
            yield f"{calibration.median_error:.1%}", text


def _warnings(studies: Studies, here: Machine) -> Iterator[str]:
    """What a reader must know before the numbers are believed."""
    if count := len(studies.stale):
        studied = "studies are" if count > 1 else "study is"
        yield f"{count} {studied} of other weights than the bundle has now, and not used."
    busy = [study for study in studies.used() if study.machine.load > study.machine.cores]
    if busy:
        listed = ", ".join(f"{s.kind} (load {s.machine.load:g} on {s.machine.cores} cores)" for s in busy)
        yield f"Made on a busy machine, so that times may be too long: {listed}."
    for study in studies.used():
        if machine_text(study.machine) != machine_text(here):
            made = f"The {study.kind} of {date(study)} was made"
            yield f"{made} on another machine: {machine_text(study.machine)}."


def _facts(manifest: Manifest, path: str) -> list[tuple[str, str]]:
    latent, defaults, asked = manifest.latent, manifest.defaults, manifest.conditioning
    kind = f"{asked.classes} classes" if asked.kind == "class" else "text"
    return [
        ("path", Markup("<code>{}</code>").format(path)),
        ("recipe", manifest.recipe),
        ("latent", f"{latent.channels} × {latent.height} × {latent.width}, decoder {manifest.decoder.kind}"),
        ("noise", str(manifest.noise)),
        ("asked for", kind + ("" if asked.guidable else ", without guidance")),
        (
            "defaults",
            f"{defaults.solver}, {defaults.steps} steps, spacing {defaults.spacing}, guidance "
            f"{defaults.guidance:g}, schedule {defaults.schedule}",
        ),
        ("parts", ", ".join(f"{name} ({part.family}, {part.precision})" for name, part in manifest.parts.items())),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]


def _members(manifest: Manifest) -> list[list[str]]:
    rows = []
    for (name, member), sha in zip(manifest.members.items(), weights_of(manifest).values(), strict=True):
        predicts = member.parametrisation + (", learned variance" if member.learned_variance else "")
        engines = "; ".join(
            f"{e.identity.backend} {e.identity.backend_version}, {e.identity.precision}, {e.identity.target}"
            for e in member.engines
        )
        digest = Markup('<code title="{}">{}</code>').format(sha, sha[:12])
        sources = ", ".join(source.name for source in member.sources)
        what = [Markup("<strong>{}</strong>").format(name), member.family, predicts, member.precision, _weight(member)]
        rows.append([*what, digest, engines or "none", sources])
    return rows


def _weight(member: Member) -> str:
    """The size of the network's files: ``41.2 MB``."""
    return f"{sum(part.bytes for part in member.onnx) / 1e6:,.1f} MB"


def _machines(studies: Studies, here: Machine, made: str) -> list[tuple[Machine, list[str]]]:
    """Every machine once, with what was made there."""
    found: dict[str, tuple[Machine, list[str]]] = {}
    said = [(study.machine, f"{study.kind} of {date(study)}") for study in studies.used()]
    for machine, what in [(here, f"this page, {made}"), *said]:
        key = f"{machine_text(machine)}|{machine.system}|{machine.python}|{machine.versions}"
        found.setdefault(key, (machine, []))[1].append(f"{what} (load {machine.load:g})")
    return list(found.values())
