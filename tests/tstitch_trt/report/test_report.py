"""``tstitch-trt report``: one page with everything on it, that loads nothing, believes no text and mixes no studies."""

from __future__ import annotations

import base64
import io
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.browser import browser_page, letter_heights, pixels
from support.command import Command, Outcome, refused
from support.manifests import manifest, member
from support.report_studies import check, divergence, evaluation, evaluation_point
from support.studies import calibration, search
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.bundle.manifest import Conditioning, Decoder, Manifest
from tstitch_trt.plots.templates import environment
from tstitch_trt.plots.words import ms
from tstitch_trt.report.page import Page, render
from tstitch_trt.report.samples import undrawable
from tstitch_trt.study.evaluate.claim import claims_of
from tstitch_trt.study.gather import Studies, by_metric, gather
from tstitch_trt.study.records import Study
from tstitch_trt.study.store import save_study, weights_of

SECTIONS = ["samples", "quality", "search", "divergence", "orders", "cost", "bundle", "machines", "commands"]
EVIL = "<script>alert(1)</script> & \"quotes\" 'too' and $\\no{formula$ with a bell \x07 and \ufffe"


class Parsed(HTMLParser):
    """The page as a browser's parser sees it: elements, texts, and that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in ("img", "meta"):
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, text: str) -> None:
        self.texts.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.elements if "id" in attributes]

    def images(self) -> list[Image.Image]:
        found = []
        for attributes in self.of("img"):
            kind, _, data = (attributes["src"] or "").partition(",")
            assert kind == "data:image/png;base64"
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            image.load()
            found.append(image)
        return found


def assert_self_contained(page: Parsed) -> None:
    for name, attributes in page.elements:
        assert name not in ("script", "link", "iframe", "object", "embed", "base"), name
        for key, value in attributes.items():
            assert not key.startswith("on"), (name, key)
            if key in ("src", "href", "srcset", "action", "data", "poster"):
                assert (value or "").startswith(("#", "data:")), (name, key, value)
    style = "".join(page.texts)
    assert "@import" not in style
    assert "url(" not in style


def every_study(bundle: Bundle) -> list[Study]:
    weights = weights_of(bundle.manifest)
    checks = (check(2, 8, 82.0, 80.0), check(8, 2, 28.0, 28.5))
    return [
        calibration(weights=weights, checks=checks),
        divergence(weights=weights),
        evaluation(weights=weights),
        search(weights=weights),
    ]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def page_of(bundle: Bundle, studies: Studies, **changes: Any) -> Parsed:
    from tstitch_trt.study.machine import describe_machine

    fields: dict[str, Any] = {
        "path": "a.bundle",
        "studies": studies,
        "samples": None,
        "reason": "No samples here.",
        "command": "tstitch-trt report a.bundle",
        "made": "2024-05-06T07:08:09Z",
        "machine": describe_machine(),
    }
    return Parsed(render(bundle, Page(**(fields | changes))))


# --- the command


@pytest.fixture(scope="module")
def measured(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in pair with one study of each kind."""
    root = tmp_path_factory.mktemp("measured") / "my fashion.bundle"
    shutil.copytree(fashion_bundle, root)
    bundle = open_bundle(root)
    for study in every_study(bundle):
        save_study(bundle, study)
    return root


@pytest.fixture(scope="module")
def report(measured: Path) -> Path:
    """A page of it, made by the command in a process of its own."""
    output = measured.parent / "report.html"
    words = ["report", str(measured), "-o", str(output), "--labels", "Bag,0-1", "--fractions", "0,0.5,1", "--seed", "7"]
    done = subprocess.run(
        [sys.executable, "-m", "tstitch_trt.cli", *words, "--steps", "4"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n"
    return output


def test_every_section_is_there_and_nothing_is_loaded(report: Path, measured: Path) -> None:
    page = Parsed(report.read_text())
    assert [a["id"] for a in page.of("section")] == SECTIONS
    assert_self_contained(page)
    ids = page.ids()
    assert len(set(ids)) == len(ids)
    assert {(a["href"] or "")[1:] for a in page.of("a")} <= set(ids)
    assert {(a["href"] or "")[1:] for a in page.of("use")} <= set(ids)
    assert len(page.of("svg")) == 2 * 6  # two metrics, search, divergence, orders, checks, each for two widths
    assert all(a["role"] == "img" and a["aria-labelledby"] in ids for a in page.of("svg"))
    for study in every_study(open_bundle(measured)):
        assert study.command in page.text
    said = ["tstitch-trt", "report", str(measured), "--output", str(report), "--fractions", "0,0.5,1"]
    assert shlex.join([*said, "--labels", "Bag,0-1", "--seed", "7", "--steps", "4"]) in page.text
    assert "not measured yet" not in page.text
    assert report.stat().st_size < 500_000


def test_samples_are_those_of_the_runtime_at_each_fraction(report: Path, measured: Path) -> None:
    page = Parsed(report.read_text())
    images = page.images()
    assert len(images) == 9
    alts = [a["alt"] or "" for a in page.of("img")]
    assert alts[:3] == [f"{name}, seed {s}, 0% of the steps on small" for name, s in
                        (("Bag", 7), ("T-shirt/top", 8), ("Trouser", 9))]  # fmt: skip
    with tstitch_trt.load(measured) as runtime:
        for row, fraction in enumerate((0, 0.5, 1)):
            drawn = runtime.sample(labels=[8, 0, 1], seed=7, steps=4, fraction=fraction).images
            assert drawn is not None
            for image, wanted in zip(images[3 * row : 3 * row + 3], drawn, strict=True):
                np.testing.assert_array_equal(np.asarray(image), wanted[..., 0])


def test_a_bundle_without_studies_says_what_measures_it(run: Command, fashion_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.html"
    outcome: Outcome = run(
        "report", fashion_bundle, "-o", output, "--steps", 2, "--fractions", "0,1", "--labels", "0,9", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["images"] == 4
    assert outcome.json["bytes"] == output.stat().st_size
    page = Parsed(output.read_text())
    assert [a["id"] for a in page.of("section")] == SECTIONS
    assert_self_contained(page)
    assert not page.of("svg")
    for name in ("evaluate", "search", "profile", "calibrate"):
        assert f"tstitch-trt {name} {fashion_bundle}" in page.text
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_bad_input_is_refused_before_anything_is_drawn(run: Command, fashion_bundle: Path, tmp_path: Path) -> None:
    bundle, page = fashion_bundle, tmp_path / "r.html"
    refused(run("report", bundle, "-o", tmp_path / "r.pdf"), "r.pdf", "r.html")
    refused(run("report", bundle, "-o", tmp_path / "no" / "r.html"), "does not exist", "mkdir")
    refused(run("report", bundle, "-o", page, "--fractions", "0,2"), "fraction '2'", "outside 0 to 1")
    refused(run("report", bundle, "-o", page, "--labels", "11"), "label 11", "0 to 9")
    refused(run("report", bundle, "-o", page, "--prompt", "a fox"), "draws classes", "--labels")
    refused(run("report", bundle, "-o", page, "--solver", "dim"), "unknown solver 'dim'", "ddim")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_page_before(
    run: Command, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "r.html"
    page.write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    outcome = run("report", measured, "-o", page, "--no-samples")
    assert outcome.code == 1
    assert "No space left" in outcome.err
    assert page.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_can_not_be_drawn_from_labels_or_prompts_is_said() -> None:
    assert undrawable(manifest()) is None
    assert "one member (large)" in (undrawable(manifest({"large": member()})) or "")
    assert "no decoder" in (undrawable(manifest(decoder=Decoder(kind="none"))) or "")
    assert "no text encoder" in (undrawable(manifest(conditioning=Conditioning(kind="text"))) or "")
    paints = msgspec.structs.replace(member(), inpaints=True)
    assert "paints" in (undrawable(manifest({"small": member(), "large": paints})) or "")


# --- what it says


@pytest.fixture(scope="module")
def fashion(fashion_bundle: Path) -> Bundle:
    return open_bundle(fashion_bundle)


def studies_of(bundle: Bundle, **changes: Any) -> Studies:
    made = every_study(bundle)
    fields: dict[str, Any] = {
        "calibrations": (made[0],),
        "divergences": (made[1],),
        "evaluations": (made[2],),
        "searches": (made[3],),
    }
    return Studies(**(fields | changes))


def test_texts_of_manifests_and_studies_are_never_markup(fashion: Bundle) -> None:
    spoilt: Manifest = msgspec.structs.replace(fashion.manifest, name=EVIL, recipe=EVIL, notes=(EVIL,))
    weights = weights_of(fashion.manifest)
    evil = {"command": EVIL, "weights": weights}
    studies = studies_of(
        fashion,
        evaluations=(evaluation(**evil, prompts=(EVIL,), notes=(EVIL,), features={"name": EVIL}),),
        divergences=(divergence(**evil, reason=EVIL, suggested=EVIL, order=EVIL, reference=EVIL),),
        stale=((search(command=EVIL), (EVIL,)),),
    )
    page = page_of(Bundle(fashion.root, spoilt), studies, path=EVIL, command=EVIL, reason=EVIL)
    assert_self_contained(page)
    assert page.text.count(EVIL) > 12


def test_escaping_is_by_construction() -> None:
    assert environment().from_string('<b title="{{ a }}">{{ b }}</b>').render(a='"x"', b="<i>") == (
        '<b title="&#34;x&#34;">&lt;i&gt;</b>'
    )
    macros = environment().get_template("plots/macros.html").module
    table = str(macros.table((EVIL,), [(EVIL,)], caption=EVIL, code=(EVIL,)))  # type: ignore[attr-defined]
    texts = [*(str(macros.command(EVIL)), str(macros.missing(EVIL, EVIL)), table)]  # type: ignore[attr-defined]
    for text in (*texts, str(macros.facts([(EVIL, EVIL)])), str(macros.figure(EVIL, EVIL))):  # type: ignore[attr-defined]
        assert "<script" not in text
        assert "&lt;script&gt;" in text


def test_stale_studies_are_listed_and_not_used(fashion: Bundle, tmp_path: Path) -> None:
    bundle = Bundle(tmp_path, fashion.manifest)
    weights = weights_of(bundle.manifest)
    save_study(bundle, calibration(weights=weights))
    save_study(bundle, evaluation(weights={**weights, "large": "0" * 64}, command="tstitch-trt evaluate old.bundle"))
    found = gather(bundle)
    assert len(found.calibrations) == 1
    assert found.evaluations == ()
    page = page_of(bundle, found)
    assert [a["id"] for a in page.of("section")] == [*SECTIONS, "stale"]
    assert "1 study is of other weights" in page.text
    assert "tstitch-trt evaluate old.bundle" in page.text
    assert "The quality of schedules was not measured yet" in page.text
    assert "18.20" not in page.text  # its distance at 40 %


def test_the_largest_share_that_is_no_worse_and_its_speed(fashion: Bundle) -> None:
    study = evaluation(weights=weights_of(fashion.manifest))
    (found,) = claims_of(study, ("small", "large"), "fid")
    assert found.fraction == 0.4  # 18.2 is within 5 % of 18, 60 is not
    assert found.speedup == pytest.approx(100.5 / 64.5)
    (better,) = claims_of(study, ("small", "large"), "precision")
    assert better.fraction == 0.4  # 0.79 is within 5 % of 0.8
    page = page_of(fashion, studies_of(fashion))
    text = "no worse than large alone (margin 5%, 1,000 samples)"
    assert f"40% of the steps on small with Fréchet distance {text}" in page.text
    assert "1.56× as fast there as large alone" in page.text
    claim = "up to 40% of the steps on small the Fréchet distance is no worse than with large alone (+0.2, at most"
    assert claim in page.text
    assert "at 100% of the steps on small the Fréchet distance is worse (+42" in page.text


def test_too_few_samples_make_no_headline(fashion: Bundle) -> None:
    """Sixteen samples, of which all fractions are within the large member's interval of 0 to 180."""
    points = tuple(
        msgspec.structs.replace(evaluation_point(small, 10 - small, 100.0 - 9 * small, fid=90.0), samples=16)
        for small in (0, 4, 10)
    )
    few = evaluation(weights=weights_of(fashion.manifest), samples=16, points=points)
    page = page_of(fashion, Studies(evaluations=(few,)))
    assert "no worse than large alone" not in page.text
    assert "as fast" not in page.text
    assert "16 samples: not enough samples to say if 40% of the steps on small is as good as large" in page.text
    assert "about 100 would do" in page.text


def test_the_evaluation_that_can_tell_most_is_in_front_and_all_name_their_size(fashion: Bundle) -> None:
    """The newest has few samples at one fraction, or many and no fraction at all."""
    weights = weights_of(fashion.manifest)
    whole = evaluation(weights=weights, made="2024-01-01T00:00:00Z")
    values = {"weights": weights, "seed": 1}
    alone = evaluation(
        **values, made="2024-03-01T00:00:00Z", samples=5000, points=(evaluation_point(0, 10, 99.0, fid=17.9),)
    )
    few = evaluation(**values, made="2024-02-01T00:00:00Z", samples=64, points=whole.points[:2])
    page = page_of(fashion, Studies(evaluations=(alone, few, whole)))
    assert "no worse than large alone (margin 5%, 1,000 samples)" in page.text
    assert page.text.index("1,000 samples a point") < page.text.index("Another evaluation, of 5,000 samples")
    assert page.text.index("of 5,000 samples a point") < page.text.index("Another evaluation, of 64 samples a point")
    assert "17.90 [17.36, 18.44]" in page.text
    found = by_metric([alone, few])["fid"]
    assert found.samples == 5000  # 64 are too few to tell a fraction


def test_a_search_of_before_there_were_resamples_says_so(fashion: Bundle) -> None:
    weights, text = weights_of(fashion.manifest), "This search keeps no resamples to compare"
    new = search(weights=weights)
    assert text not in page_of(fashion, Studies(searches=(new,))).text
    points = tuple(
        msgspec.structs.replace(point, quality=msgspec.structs.replace(point.quality, deviations=b""))
        for point in new.points
    )
    assert text in page_of(fashion, Studies(searches=(search(weights=weights, points=points),))).text


def test_a_suggestion_of_few_seeds_makes_no_headline(fashion: Bundle) -> None:
    weights = weights_of(fashion.manifest)
    text = "seeds' divergence from large, order small-first"
    assert f"suggested by 16 {text}" in page_of(fashion, Studies(divergences=(divergence(weights=weights),))).text
    few = divergence(weights=weights, seeds=(0, 1))
    assert text not in page_of(fashion, Studies(divergences=(few,))).text


def test_distances_from_the_large_member_make_no_headline(fashion: Bundle) -> None:
    points = tuple(evaluation_point(small, 10 - small, 50.0, latent_error=0.01 * small) for small in (0, 4, 10))
    study = evaluation(weights=weights_of(fashion.manifest), points=points, metrics=("latent_error",))
    page = page_of(fashion, Studies(evaluations=(study,)))
    assert "no worse" not in page.text
    assert "Compared with large alone in 10 steps, from the same seeds" in page.text


def test_evaluations_of_equal_conditions_are_joined_and_others_are_not() -> None:
    newest = evaluation(made="2024-03-01T00:00:00Z", points=(evaluation_point(4, 6, 64.0, fid=18.1),))
    same = evaluation(made="2024-02-01T00:00:00Z")
    few = evaluation(made="2024-01-01T00:00:00Z", samples=100, points=(evaluation_point(2, 8, 82.0, fid=33.0),))
    joined = by_metric([newest, same, few])["fid"]
    assert joined is not None
    values = {point.setting.schedule: point.measures["fid"].value for point in joined.points}
    assert values == {"small:4,large:6": 18.1, "large:10": 18.0, "small:10": 60.0, "large:5": 24.0}
    only = by_metric([newest, same, few])["precision"]  # the newest has none
    assert only is not None
    assert only.made == same.made
    assert "kid" not in by_metric([few])


def test_a_point_that_lacks_a_metric_is_in_the_table(fashion: Bundle) -> None:
    """The large member alone has no PSNR: it is infinite."""
    points = (evaluation_point(0, 10, 0.0, fid=18.0), evaluation_point(4, 6, 0.0, fid=18.25, psnr=32.5))
    page = page_of(fashion, Studies(evaluations=(evaluation(weights=weights_of(fashion.manifest), points=points),)))
    assert "0% large:10 10 – 18.00 [17.46, 18.54] –" in page.text
    assert "40% small:4,large:6 10 – 18.25 [17.70, 18.80] 32.50" in page.text


def test_points_without_a_time_are_in_the_table_only(fashion: Bundle) -> None:
    untimed = evaluation(weights=weights_of(fashion.manifest), points=(evaluation_point(4, 6, 0.0, fid=18.25),))
    page = page_of(fashion, Studies(evaluations=(untimed,)))
    assert not page.of("svg")
    assert "Fréchet distance: no point was timed" in page.text
    assert "18.25 [17.70, 18.80]" in page.text


def test_plots_follow_the_page_and_say_their_points(fashion: Bundle) -> None:
    page = page_of(fashion, studies_of(fashion))
    assert "small:4,large:6, 10 ddim steps: 8.06 ms per image, Fréchet distance 18.20 [17.65, 18.75]" in page.text
    assert "small:2,large:8, 10 steps, batch 8: predicted 82.0 ms, measured 80.0 ms (+2.5%)" in page.text
    styles = " ".join(a.get("style") or "" for _, a in page.elements)
    assert "var(--series-1)" in styles
    assert "#0101" not in styles


def test_without_matplotlib_the_plots_are_refused_by_name(measured: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\nfrom tstitch_trt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["report", str(measured), "-o", str(tmp_path / "r.html"), "--no-samples"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tstitch-trt[plot]" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "text"), [(0.1234, "0.123"), (12.345, "12.3"), (99.96, "100"), (1234.5, "1,234")])
def test_milliseconds_have_three_digits(value: float, text: str) -> None:
    assert ms(value) == text


# --- in a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(report: Path, scheme: str) -> None:
    with browser_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme, java_script_enabled=False) as seen:
        seen.page.goto(report.as_uri())
        assert [url for url in seen.requests if not url.startswith("data:")] == [report.as_uri()]
        assert not seen.failed
        assert not seen.errors
        whole = pixels(seen.page.screenshot(full_page=True))
        ground = whole[2, 2]
        assert (ground.mean() > 200) == (scheme == "light")
        for plot in seen.page.query_selector_all("svg.plot:visible"):
            box = plot.bounding_box()
            assert box["width"] > 400
            assert box["height"] > 100
            x, y, w, h = (int(box[key]) for key in ("x", "y", "width", "height"))
            part = whole[y : y + h, x : x + w].astype(int)
            coloured = part.max(axis=2) - part.min(axis=2) > 60  # a series, where text and rules are grey
            assert coloured.sum() > 60  # one marker has about fifty
        for image in seen.page.query_selector_all("img"):
            assert image.bounding_box()["width"] == 84


def test_on_a_phone_tables_scroll_in_their_box_and_plots_have_large_letters(report: Path) -> None:
    with browser_page(viewport={"width": 390, "height": 844}) as seen:  # JavaScript is for the test alone
        page = seen.page
        page.goto(report.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        boxes = page.locator(".scroll").evaluate_all(
            """boxes => boxes.filter(box => box.scrollWidth > box.clientWidth).map(box => {
                const fade = () => getComputedStyle(box).getPropertyValue('--fade-right');
                const before = fade();
                box.scrollLeft = box.scrollWidth;
                return [box.tabIndex, box.getAttribute('role'), box.getAttribute('aria-label').length > 0, before];
            })"""
        )
        assert len(boxes) >= 4
        assert all(box == [0, "region", True, "48px"] for box in boxes), boxes
        page.wait_for_function(
            "[...document.querySelectorAll('.scroll')]"
            ".every(box => getComputedStyle(box).getPropertyValue('--fade-right') == '0px')"
        )
        letters = letter_heights(page.locator("svg.plot:visible text"))
        assert len(letters) > 50
        assert min(letters) >= 10
        names = page.locator(".samples tbody th").first.bounding_box()
        page.locator(".scroll:has(.samples)").evaluate("box => { box.scrollLeft = 40; }")
        assert page.locator(".samples tbody th").first.bounding_box()["x"] == names["x"]  # they stay in view
