"""What a report says beside the studies: samples, bundle, machines, commands, warnings."""

from __future__ import annotations

from collections.abc import Sequence

from tstitch_engines.bundle.manifest import Manifest, Member
from tstitch_trt.plots.markup import Markup, command, facts, join, paragraph, table, tag
from tstitch_trt.plots.words import date, machine_text, ms
from tstitch_trt.report.samples import Samples, png_url
from tstitch_trt.report.sections import Context, missing, section
from tstitch_trt.study.gather import word_of
from tstitch_trt.study.machine import Machine
from tstitch_trt.study.store import weights_of

__all__ = ["about_bundle", "commands", "machines", "sample_rows", "stale", "weight_of"]

_SMALLEST = 84  # pixels a side on the page: smaller pictures are enlarged


def sample_rows(context: Context, samples: Samples | None, reason: str) -> Markup:
    """``reason``: why there are no ``samples``."""
    title = "Samples by fraction"
    if samples is None:
        return section("samples", title, missing(reason, context.command("sample", "-o", "samples.png")))
    head = tag("tr", tag("td"), *(tag("th", text, scope="col") for text in samples.asked))
    rows = []
    for row in samples.rows:
        cells = []
        for asked, seed, image in zip(samples.asked, samples.seeds, row.images, strict=True):
            url, width, height = png_url(image)
            factor = max(1, _SMALLEST // max(width, height))
            alt = f"{asked}, seed {seed}, {row.fraction:.0%} of the steps on {context.first}"
            size = {"width": str(width * factor), "height": str(height * factor)}
            cells.append(tag("td", tag("img", src=url, alt=alt, **size)))
        label = tag(
            "th",
            tag("strong", f"{row.fraction:.0%}"),
            tag("span", " + ".join(f"{count} {name}" for name, count in row.members.items())),
            tag("span", f"{ms(row.ms_per_image)} ms/image"),
            scope="row",
        )
        rows.append(tag("tr", label, *cells))
    grid = tag("table", tag("thead", head), tag("tbody", *rows), class_="samples")
    caption = (
        f"Rows: the share of the steps on {context.first}. Columns: the same seed "
        f"({samples.seeds[0]}{f' to {samples.seeds[-1]}' if len(samples.seeds) > 1 else ''}), so the same noise, in "
        f"every row. {samples.steps} {samples.solver} steps, guidance {samples.guidance:g}. Drawn when this page was "
        "made; the times are of this one run, without decoding."
    )
    inner = tag("div", grid, class_="scroll", tabindex="0", role="region", aria_label=title)
    return section("samples", title, tag("figure", inner, tag("figcaption", caption)))


def about_bundle(manifest: Manifest, path: str) -> Markup:
    latent, noise, defaults, asked = manifest.latent, manifest.noise, manifest.defaults, manifest.conditioning
    rows = [_member(name, member) for name, member in manifest.members.items()]
    parts = ", ".join(f"{name} ({part.family}, {part.precision})" for name, part in manifest.parts.items())
    kind = f"{asked.classes} classes" if asked.kind == "class" else "text"
    return section(
        "bundle",
        "Bundle",
        facts(
            (
                ("path", tag("code", path)),
                ("recipe", manifest.recipe),
                ("latent", f"{latent.channels} × {latent.height} × {latent.width}, decoder {manifest.decoder.kind}"),
                ("noise", f"{noise.kind}, {noise.steps} steps, beta {noise.beta_start:g} to {noise.beta_end:g}"),
                ("asked for", kind + ("" if asked.guidable else ", without guidance")),
                (
                    "defaults",
                    f"{defaults.solver}, {defaults.steps} steps, spacing {defaults.spacing}, guidance "
                    f"{defaults.guidance:g}, schedule {defaults.schedule}",
                ),
                ("parts", parts),
                ("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
            )
        ),
        table(
            ("member", "family", "predicts", "precision", "weights", "ONNX sha256", "engines", "sources"),
            [
                [*row, tag("code", sha[:12], title=sha), *rest]
                for (row, rest), sha in zip(rows, weights_of(manifest).values(), strict=True)
            ],
            caption="Members",
        ),
        tag("ul", *(tag("li", note) for note in manifest.notes), class_="warnings") if manifest.notes else None,
    )


def weight_of(member: Member) -> str:
    """The size of the network's files: ``41.2 MB``."""
    return f"{sum(part.bytes for part in member.onnx) / 1e6:,.1f} MB"


def _member(name: str, member: Member) -> tuple[list[Markup | str], list[Markup | str]]:
    """The cells before and after the hash."""
    predicts = member.parametrisation + (", learned variance" if member.learned_variance else "")
    engines = "; ".join(
        f"{e.identity.backend} {e.identity.backend_version}, {e.identity.precision}, {e.identity.arch}"
        for e in member.engines
    )
    sources = ", ".join(source.name for source in member.sources)
    before: list[Markup | str] = [tag("strong", name), member.family, predicts, member.precision, weight_of(member)]
    return before, [engines or "none", sources]


def machines(context: Context, here: Machine, made: str) -> Markup:
    """Every machine once, with what was made there."""
    found: dict[str, tuple[Machine, list[str]]] = {}
    said = [(study.machine, f"{word_of(study)} of {date(study)}") for study in context.studies.used()]
    for machine, what in [(here, f"this page, {made}"), *said]:
        key = f"{machine_text(machine)}|{machine.system}|{machine.python}|{machine.versions}"
        found.setdefault(key, (machine, []))[1].append(f"{what} (load {machine.load:g})")
    parts = [
        tag(
            "article",
            tag("h3", machine.processor),
            facts(
                (
                    ("cores", f"{machine.cores}"),
                    ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
                    ("GPUs", ", ".join(machine.gpus) or "none"),
                    ("system", machine.system),
                    ("Python", machine.python),
                    ("libraries", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
                    ("made here", tag("ul", *(tag("li", what) for what in made_here))),
                )
            ),
        )
        for machine, made_here in found.values()
    ]
    return section("machines", "Machines", *parts)


def commands(context: Context, own: str) -> Markup:
    listed = [tag("h3", "This page"), command(own)]
    for study in context.studies.used():
        listed += [tag("h3", f"{word_of(study).capitalize()}, {date(study)}"), command(study.command)]
    return section("commands", "Commands", paragraph("What makes everything on this page again."), *listed)


def stale(context: Context) -> Markup | None:
    """Studies of other weights. ``None`` without any."""
    if not context.studies.stale:
        return None
    rows: list[Sequence[Markup | str]] = [
        [word_of(study).capitalize(), date(study), ", ".join(differing), tag("code", study.command)]
        for study, differing in context.studies.stale
    ]
    text = (
        "These were measured on other weights than the bundle has now. Nothing on this page uses them; the command "
        "measures again."
    )
    return section(
        "stale",
        "Stale studies",
        join((paragraph(text), table(("study", "made", "members that differ", "command"), rows))),
    )
