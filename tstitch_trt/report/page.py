"""The page as a whole: head, summary, sections, style. It asks nothing of the network and needs no JavaScript."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from tstitch_engines.bundle.bundle import Bundle
from tstitch_trt.plots.markup import Markup, paragraph, tag
from tstitch_trt.plots.words import METRIC_NAMES, date, interval, machine_text, ms
from tstitch_trt.report.facts import about_bundle, commands, machines, sample_rows, stale, weight_of
from tstitch_trt.report.finding import finding
from tstitch_trt.report.samples import Samples
from tstitch_trt.report.sections import Context, cost, divergence, orders, quality, searching
from tstitch_trt.study.gather import Studies, evaluation_of, metrics_of, word_of
from tstitch_trt.study.machine import Machine, version

__all__ = ["Page", "render"]


@dataclass(frozen=True)
class Page:
    """``path``: the bundle as it was named. ``reason``: why there are no ``samples``. ``command``: makes this page
    again. ``made``: when, ISO 8601 in UTC."""

    path: str
    studies: Studies
    samples: Samples | None
    reason: str
    command: str
    made: str
    machine: Machine


def render(bundle: Bundle, page: Page) -> str:
    """The HTML. Raises ``Unavailable`` where there are plots to draw and no matplotlib."""
    manifest = bundle.manifest
    members = list(manifest.members)
    context = Context(page.path, members[0], members[-1], page.studies)
    when = f"{page.made[:10]} {page.made[11:16]} UTC"
    sections = {
        "Samples": sample_rows(context, page.samples, page.reason),
        "Time and quality": quality(context),
        "Search": searching(context),
        "Divergence": divergence(context),
        "Order": orders(context),
        "Cost": cost(context),
        "Bundle": about_bundle(manifest, page.path),
        "Machines": machines(context, page.machine, when),
        "Commands": commands(context, page.command),
    }
    if (old := stale(context)) is not None:
        sections["Stale studies"] = old
    keys = ("samples", "quality", "search", "divergence", "orders", "cost", "bundle", "machines", "commands", "stale")
    links = [tag("a", name, href=f"#{key}") for key, name in zip(keys, sections, strict=False)]
    title = f"{manifest.name}: choosing the stitch point"
    sizes = " and ".join(f"{name} ({weight_of(member)})" for name, member in manifest.members.items())
    body = tag(
        "body",
        tag("a", "Skip to the samples", href="#samples", class_="skip"),
        tag(
            "header",
            paragraph("tstitch-trt report", class_="kicker"),
            tag("h1", title),
            paragraph(f"Members {sizes}. Made on {when} with tstitch-trt {version()}.", class_="lead"),
            _cards(context),
            _warnings(context, page.machine),
        ),
        tag("nav", *links, aria_label="Sections"),
        tag("main", *sections.values()),
        tag("footer", paragraph(f"Made by tstitch-trt {version()} on {when}. One file; it loads nothing.")),
    )
    style = Markup(files("tstitch_trt.report").joinpath("style.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"tstitch-trt {version()}"),
        tag("title", title),
        tag("style", style),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _cards(context: Context) -> Markup | None:
    """The few numbers that answer "why this fraction?", as far as they were measured."""
    cards: list[Markup] = []
    studies = context.studies
    for metric in metrics_of(studies.evaluations)[:1]:
        evaluation = evaluation_of(studies.evaluations, metric)
        assert evaluation is not None
        found = finding(evaluation, metric, first=context.first, last=context.last)
        if found is not None:
            name, base = METRIC_NAMES.get(metric, metric), found.alone.measures[metric]
            text = f"of the steps on {context.first} with {name} no worse than {context.last} alone {interval(base)}"
            cards.append(_card(f"{found.share:.0%}", text))
            if found.speedup:
                here, alone = (ms(p.ms / p.batch) for p in (found.point, found.alone))
                cards.append(_card(f"{found.speedup:.2f}×", f"faster there: {here} ms per image instead of {alone}"))
    cards += [
        _card(study.suggested, f"suggested by the divergence from {study.reference}, order {study.order}")
        for study in studies.divergences[:1]
    ]
    for calibration in studies.calibrations[:1]:
        if calibration.checks:
            text = f"median error of predicted times, worst {calibration.worst_error:.1%}"
            cards.append(_card(f"{calibration.median_error:.1%}", text))
    return tag("div", *cards, class_="cards") if cards else None


def _warnings(context: Context, here: Machine) -> Markup | None:
    """What a reader must know before the numbers are believed."""
    said = []
    if count := len(context.studies.stale):
        said.append(
            f"{count} stud{'ies are' if count > 1 else 'y is'} of other weights than the bundle has now, and not used."
        )
    busy = [study for study in context.studies.used() if study.machine.load > study.machine.cores]
    if busy:
        listed = ", ".join(f"{word_of(s)} (load {s.machine.load:g} on {s.machine.cores} cores)" for s in busy)
        said.append(f"Made on a busy machine, so that times may be too long: {listed}.")
    away = [study for study in context.studies.used() if machine_text(study.machine) != machine_text(here)]
    said += [f"The {word_of(s)} of {date(s)} was made on another machine: {machine_text(s.machine)}." for s in away]
    return tag("ul", *(tag("li", text) for text in said), class_="warnings", id="notes") if said else None


def _card(value: str, text: str) -> Markup:
    return tag("div", tag("strong", value), tag("span", text), class_="card long" if len(value) > 12 else "card")
