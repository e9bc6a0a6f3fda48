"""From a budget to a schedule: the best that fits, by whichever study knows the quality, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import pytest

from support.manifests import manifest, member
from support.studies import calibration, divergence, evaluation, measure, overhead, search, search_point, step_cost
from tstitch_engines.bundle.manifest import Component, Defaults
from tstitch_engines.errors import BadInput
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.request.batching import Splitting
from tstitch_trt.runtime.chooser import ChosenSchedule
from tstitch_trt.study.budget import Costs, predict_ms
from tstitch_trt.study.records import Calibration, Measure, Study
from tstitch_trt.study.settings import options_of
from tstitch_trt.study.store import weights_of


def pair(*names: str) -> Any:
    """A manifest whose members have weights."""
    members = {
        name: msgspec.structs.replace(
            member(), onnx=(Component(path=f"{name}/model.onnx", sha256=name[0] * 64, bytes=1),)
        )
        for name in names or ("small", "large")
    }
    return manifest(members, defaults=Defaults(steps=10))


MANIFEST = pair()


def costs(**changes: Any) -> Calibration:
    """A small step takes 1 ms and a large one 10 on 1 to 8 images, guided ones twice as much; 2 ms once, 1 a switch."""
    fields: dict[str, Any] = {
        "steps": tuple(
            step_cost(name, batch, ms * (2 if guided else 1), guided=guided)
            for name, ms in (("small", 1.0), ("base", 4.0), ("large", 10.0))
            for guided in (False, True)
            for batch in (1, 8)
        ),
        "overheads": (overhead(1, 2.0, switch=1.0), overhead(8, 2.0, switch=1.0)),
        "splitting": Splitting(floor=1, limit=8),
        "upper_ratio": 1.1,
    }
    return calibration(**(fields | changes))


def choose(budget_ms: float, *studies: Study, made: Any = MANIFEST, images: int = 4, **settings: Any) -> ChosenSchedule:
    return Costs(made, costs(), studies).choose(budget_ms, images=images, options=PlanOptions(**settings))


def test_without_studies_the_rule_gives_the_large_member_what_fits() -> None:
    """10 steps, k of them large: 2 + 1 + k 10 + (10 - k) 1 ms, times 1.1; one member alone does not switch."""
    for budget_ms in (14, 30, 60, 100, 112, 113, 1000):
        taken = {k: 1.1 * (2 + (0 < k < 10) + 10 * k + (10 - k)) for k in range(11)}
        k = max(k for k, ms in taken.items() if ms <= budget_ms)
        got = choose(budget_ms)
        want = {0: "small:10", 10: "large:10"}.get(k, f"small:{10 - k},large:{k}")
        assert (got.schedule, got.source, got.quality) == (want, "rule", k / 10)
        assert got.upper_ms == pytest.approx(taken[k])
        assert got.predicted_ms == pytest.approx(taken[k] / 1.1)
        assert not got.interpolated


def test_the_rule_keeps_what_the_request_fixes() -> None:
    got = choose(200, steps=20, solver="dpmpp-2m", guidance=2.0)
    assert (got.steps, got.solver) == (20, "dpmpp-2m")
    plan = make_plan(MANIFEST, **got.settings)
    assert plan.guided == (True,) * 20
    assert got.predicted_ms == pytest.approx(predict_ms(costs(), plan, batch=4))
    assert choose(200, made=pair("small", "base", "large")).schedule == "large:10"  # first and last
    assert choose(200, made=pair("large")).schedule == "large:10"


POINTS = (
    search_point("large:10", 18.0),
    search_point("large:6", 25.0),
    search_point("large:2", 90.0),
    search_point("small:10", 60.0),
    search_point("small:5,large:5", 20.0),
    search_point("large:2,small:6,large:2", 33.0),
    search_point("small:3,base:3,large:2", 30.0),
    search_point("small:9,large:1", 10.0, dropped=True),
    search_point("small:20", 50.0, solver="dpmpp-2m"),
)


@pytest.mark.parametrize(("metric", "sign"), [("fid", -1), ("precision", 1)])
def test_the_choice_is_that_of_trying_all(metric: str, sign: int) -> None:
    """Of points and of what lies between small:10, small:5,large:5 and large:10, by hand."""
    made = pair("small", "base", "large")
    study = search(weights=weights_of(made), metric=metric, points=POINTS)
    known = {point.setting.schedule: (options_of(point.setting), point.quality.value) for point in POINTS[:-2]}
    known["small:20"] = (options_of(POINTS[-1].setting), 50.0)
    base = {"steps": 10, "solver": "ddim", "guidance": 1.0}
    for k in range(1, 10):
        value = 18 + (20 - 18) * k / 5 if k < 5 else 20 + (60 - 20) * (k - 5) / 5
        if k != 5:
            known[f"small:{k},large:{10 - k}"] = (PlanOptions(**base, schedule=f"small:{k},large:{10 - k}"), value)
    plans = [(make_plan(made, options), options.schedule, value) for options, value in known.values()]
    chooser = Costs(made, costs(), [study])
    for images, budget_ms in itertools.product((1, 8, 20), (15, 24, 40, 66, 90, 130, 400)):
        fitting = []
        for plan, schedule, value in plans:
            ms = 1.1 * predict_ms(costs(), plan, batch=images)
            if ms <= budget_ms:
                fitting.append((sign * value, -ms, schedule))
        if not fitting:
            continue
        got = chooser.choose(budget_ms, images=images)
        goodness, ms, schedule = max(fitting)
        assert (got.schedule, got.source, got.metric) == (schedule, "search", metric)
        assert sign * got.quality == pytest.approx(goodness)
        assert got.upper_ms == pytest.approx(-ms)
        assert got.made == study.made


def test_between_measured_switches_the_budget_is_used() -> None:
    study = search(weights=weights_of(MANIFEST))  # 10, 4 and 0 small steps
    got = choose(80, study)  # 1.1 (3 + 10 k + (10 - k)) <= 80: k = 6 is measured, one more large step would not fit
    assert (got.schedule, got.interpolated, got.quality) == ("small:4,large:6", False, 20.0)
    got = choose(90, study)
    assert (got.schedule, got.interpolated) == ("small:3,large:7", True)
    assert got.quality == pytest.approx(20 + (18 - 20) / 4)
    assert "interpolated" in str(got)


def test_other_solvers_and_guidance_are_not_mixed() -> None:
    points = (search_point("large:10", 5.0), search_point("small:10", 9.0, solver="dpmpp-2m"))
    got = choose(60, search(weights=weights_of(MANIFEST), points=points))
    assert (got.schedule, got.solver, got.interpolated) == ("small:10", "dpmpp-2m", False)


def test_what_the_request_fixes_must_be_as_it_was_measured() -> None:
    points = (
        search_point("large:12", 5.0),
        search_point("small:10", 9.0),
        search_point("small:20", 8.0),
        search_point("small:10", 7.0, eta=0.5),
    )
    study = search(weights=weights_of(MANIFEST), points=points)
    assert choose(100, study).settings["eta"] == 0.5  # left open: the best
    assert choose(100, study, steps=20).quality == 8
    assert choose(100, study, steps=20, history="keep").quality == 8  # as by default
    for other in (
        {"guidance": 3.0},
        {"steps": 7},
        {"solver": "euler"},
        {"history": "reset", "solver": "dpmpp-2m"},
        {"spacing": "linspace"},
    ):
        got = choose(1000, study, **other)
        (name, value) = next(iter(other.items()))
        assert got.source == "rule", other
        assert got.settings[name] == value
        assert f"{name} {value}" in got.notes[0]


def test_studies_are_asked_in_their_order() -> None:
    weights = weights_of(MANIFEST)
    found = search(weights=weights, points=(search_point("large:10", 18.0),))
    values = {"large:12": {"fid": 18.0}, "small:10": {"fid": 40.0}, "large:8": {"kid": 1.0}}
    graded = evaluation(values, weights=weights)
    diverging = divergence({"small:5,large:5": 0.2, "small:8,large:2": 0.5}, weights=weights)
    studies = (diverging, graded, found)
    assert choose(200, *studies).source == "search"
    got = choose(50, *studies)  # the search knows nothing so cheap
    assert (got.source, got.metric, got.schedule) == ("evaluation", "fid", "small:10")
    assert choose(200, diverging).schedule == "large:10"  # no error at all
    got = choose(64, diverging)
    assert (got.source, got.metric, got.schedule) == ("divergence", "latent_error", "small:5,large:5")
    got = choose(50, diverging)
    assert (got.schedule, got.interpolated, got.quality) == ("small:7,large:3", True, pytest.approx(0.4))
    assert choose(30, diverging).source == "rule"


@pytest.mark.parametrize(
    ("measures", "metric"),
    [
        ({"psnr": 30.0, "fid": 9.0, "kid": 0.1}, "fid"),
        ({"psnr": 30.0, "kid": 0.1}, "kid"),
        ({"psnr": 30.0, "lpips": 0.1}, "lpips"),
        ({"psnr": 30.0, "clip": 0.3}, "psnr"),
        ({"accuracy": 0.9}, ""),
    ],
)
def test_an_evaluation_is_read_by_its_best_metric(measures: dict[str, float], metric: str) -> None:
    got = choose(500, evaluation({"large:10": measures}, weights=weights_of(MANIFEST)))
    assert got.metric == (metric or "share of the last member")
    assert got.source == ("evaluation" if metric else "rule")


def noisy(value: float) -> Measure:
    return measure(value, std=3.0, own=0.9)


LARGE = measure(20.0, std=3.0)


def test_a_value_that_is_good_by_chance_is_not_chosen() -> None:
    """Of 30 % the value is the best, and it may be worse by five; the large member is not worse than itself."""
    points = {"large:10": LARGE, "small:1,large:9": measure(20.1, std=3.0), "small:3,large:7": noisy(19.0)}
    for study in (
        search(weights=weights_of(MANIFEST), points=tuple(search_point(text, m) for text, m in points.items())),
        evaluation({text: {"fid": m} for text, m in points.items()}, weights=weights_of(MANIFEST)),
    ):
        assert choose(1000, study).schedule == "large:10"
        got = choose(105, study)  # small:1,large:9 takes 103.4
        assert (got.schedule, got.quality) == ("small:1,large:9", 20.1)


def test_a_share_behind_one_that_is_worse_is_not_chosen_for_its_value() -> None:
    values = {
        "large:10": 20.0,
        "small:2,large:8": 20.2,
        "small:5,large:5": 26.0,
        "small:7,large:3": 20.1,
        "large:4": 23.0,
    }
    study = search(weights=weights_of(MANIFEST), points=tuple(search_point(text, v) for text, v in values.items()))
    got = choose(55, study)
    assert (got.schedule, got.quality) == ("large:4", 23.0)


@pytest.mark.parametrize("samples", [16, 64, 1000])
def test_a_study_whose_samples_are_too_few_is_named_and_not_used(samples: int) -> None:
    """The rule of T-Stitch decides in its place, which needs no measurement."""
    points = {"large:10": LARGE, "small:5,large:5": noisy(20.0), "small:10": noisy(19.0)}
    made = tuple(search_point(text, m) for text, m in points.items())
    searched = search(weights=weights_of(MANIFEST), points=made, samples=samples)
    graded = evaluation({t: {"fid": m} for t, m in points.items()}, weights=weights_of(MANIFEST), samples=samples)
    got = choose(1000, searched, graded)
    assert (got.source, got.schedule) == ("rule", "large:10")
    assert [note.split(" of ")[0] for note in got.notes] == ["the search", "the evaluation"]
    assert all(f"not used to choose by fid: {samples:,} samples are not enough; about " in note for note in got.notes)


def test_a_study_of_before_there_were_resamples_is_named_and_not_used() -> None:
    old = [msgspec.structs.replace(measure(value), deviations=b"") for value in (20.0, 21.0)]
    points = tuple(search_point(text, m) for text, m in zip(("large:10", "small:10"), old, strict=True))
    got = choose(1000, search(weights=weights_of(MANIFEST), points=points))
    assert got.source == "rule"
    assert "keeps no resamples to compare" in got.notes[0]


def test_a_study_without_the_large_member_alone_has_nothing_to_compare_with() -> None:
    got = choose(1000, search(weights=weights_of(MANIFEST), points=(search_point("small:10", 1.0),)))
    assert got.source == "rule"
    assert "has no fid of 'large' alone to compare with" in got.notes[0]


def test_the_study_with_the_most_samples_decides_and_not_the_newest() -> None:
    few = evaluation({"large:10": {"fid": 1.0}}, weights=weights_of(MANIFEST), samples=200)
    many = evaluation({"large:10": {"fid": 2.0}}, weights=weights_of(MANIFEST), samples=2000)
    assert choose(1000, few, many).quality == 2.0


def test_solvers_that_are_each_compared_with_themselves_are_not_mixed() -> None:
    """Each solver's distance from its own most steps: another solver's zero says nothing."""
    values = {"large:10": {"latent_error": 0.0}, "large:4": {"latent_error": 0.3}}
    ddim = evaluation(values, weights=weights_of(MANIFEST))
    other = evaluation({"large:2": {"latent_error": 0.0}}, weights=weights_of(MANIFEST), solver="dpmpp-2m")
    study = msgspec.structs.replace(ddim, points=(*ddim.points, *other.points))
    got = choose(60, study)
    assert (got.schedule, got.solver) == ("large:4", "ddim")


def test_psnr_is_better_when_it_is_higher() -> None:
    study = evaluation({"small:10": {"psnr": 20.0}, "large:9": {"psnr": 30.0}}, weights=weights_of(MANIFEST))
    assert choose(500, study).schedule == "large:9"


def test_studies_of_other_weights_are_named_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    stale = search(weights={**weights_of(MANIFEST), "large": "f" * 64})
    fresh = search(weights=weights_of(MANIFEST), made="2001-01-01T00:00:00Z")
    got = choose(500, stale, fresh)
    assert got.made == fresh.made
    assert got.notes == (f"the search of {stale.made} is of other weights ('large') and not used",)
    assert got.notes[0] in caplog.text
    assert choose(500, stale).source == "rule"


def test_the_newest_study_that_covers_the_request_decides() -> None:
    weights = weights_of(MANIFEST)
    old = search(weights=weights, made="2001-01-01T00:00:00Z", points=(search_point("large:10", 1.0),))
    new = search(weights=weights, made="2002-01-01T00:00:00Z", points=(search_point("large:9", 2.0),))
    assert choose(500, new, old).quality == 2.0
    assert choose(500, new, old, steps=10).quality == 1.0


def test_an_infeasible_budget_names_the_nearest() -> None:
    study = search(weights=weights_of(MANIFEST), points=(search_point("small:4", 50.0), search_point("large:9", 1.0)))
    with pytest.raises(BadInput) as caught:
        choose(5, study)
    least = 1.1 * (2 + 4)
    nearest = math.ceil(10 * least) / 10
    assert "4 images within 5 ms; the cheapest, small:4 (ddim), takes 6.0 ms, and up to 6.6 ms" in caught.value.message
    assert f"--budget-ms {nearest:g} (latency_budget_ms={nearest:g})" in caught.value.hint
    assert choose(nearest, study).schedule == "small:4"
    with pytest.raises(BadInput, match="the cheapest, small:10 "):
        choose(5, study, steps=10)


@pytest.mark.parametrize("budget_ms", [0, -1, math.inf, math.nan, True, "fast"])
def test_a_budget_is_a_time(budget_ms: Any) -> None:
    with pytest.raises(BadInput, match="latency budget of"):
        choose(budget_ms)


def test_only_the_steps_that_run_are_paid_for() -> None:
    """From a picture at strength 0.5 the later half runs, all of it large."""
    known = Costs(MANIFEST, costs(), [])
    got = known.choose(60, images=1, options=PlanOptions(steps=10), start=lambda steps: steps // 2)
    assert (got.schedule, got.predicted_ms) == ("large:10", pytest.approx(2 + 50))
    got = known.choose(50, images=1, options=PlanOptions(steps=10), start=lambda steps: steps // 2)
    assert (got.schedule, got.predicted_ms) == ("small:6,large:4", pytest.approx(2 + 1 + 1 + 40))
    assert known.choose(60, images=1, options=PlanOptions(steps=10)).schedule == "small:6,large:4"


def test_more_images_cost_their_chunks() -> None:
    got = choose(1.1 * 39, images=20)
    assert got.schedule == "small:10"  # three chunks of 12 ms
    assert got.predicted_ms == pytest.approx(36)
