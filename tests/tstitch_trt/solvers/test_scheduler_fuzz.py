"""Random scheduler configurations: the trajectory of diffusers' own class, or refused for a reason that is true.

What a pipeline's call becomes (``plan_keywords``, ``make_plan``) is walked beside the scheduler's own ``step`` with one
model and one noise, both in float64.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from support.manifests import manifest, member
from support.scheduler_fuzz import BENIGN, Outcome, changed_by, draw_case, named_key, otherwise, run
from tstitch_engines.bundle.manifest import Defaults
from tstitch_engines.bundle.scheduler_config import SCHEDULERS, Scheduler, read_scheduler
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.pipeline.scheduler import AskedSteps, plan_keywords, read_own
from tstitch_trt.plan.plan import make_plan

pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """diffusers says of every key that its class does not read that it is ignored."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def check(seed: int) -> Outcome:
    case = draw_case(seed)
    found = run(case)
    assert found.kind != "differs", f"seed {seed}: {found.error:.2e} {found.message} {case}"
    assert "those of its configuration are" not in found.message, f"seed {seed}: {found.message} {case}"
    if found.kind == "refused":
        then = run(otherwise(case, found.message))
        assert then.message != found.message, f"seed {seed}: {then.message} whether or not it is left out of {case}"
        if (key := named_key(found.message)) and case.steps != 1:  # one step may be the same by any spacing
            assert changed_by(case, key, BENIGN.get(key)), f"seed {seed}: {key} changes nothing in {case}"
    return found


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_configurations(first: int) -> None:
    kinds = Counter(check(seed).kind for seed in range(first, first + 20))
    assert kinds["equal"] >= 8


@pytest.mark.slow
@pytest.mark.parametrize("first", range(60, 2060, 200))
def test_two_thousand_configurations(first: int) -> None:
    kinds = Counter(check(seed).kind for seed in range(first, first + 200))
    assert kinds["equal"] >= 100


@pytest.mark.parametrize(
    ("first", "count"), [(0, 30), pytest.param(10_000, 300, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_schedulers_as_they_are_shipped(first: int, count: int) -> None:
    """In float32, by the whole of what ``accelerate`` does with a scheduler."""
    kinds = Counter[str]()
    for seed in range(first, first + count):
        found = run(draw_case(seed), shipped=True)
        assert found.kind != "differs", f"seed {seed}: {found.error:.2e} {found.message} {draw_case(seed)}"
        assert "those of its configuration are" not in found.message, f"seed {seed}: {found.message}"
        kinds[found.kind] += 1
    assert kinds["equal"] > count / 2


def test_every_class_of_diffusers_is_read_or_refused_by_name() -> None:
    import diffusers

    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
    classes = [getattr(diffusers, name) for name in names]
    configured = [cls.__name__ for cls in classes if inspect.isclass(cls) and hasattr(cls, "from_config")]
    assert set(SCHEDULERS) < set(configured)
    assert len(configured) > 40
    for name in configured:
        if name not in SCHEDULERS:
            with pytest.raises(UnknownName, match=f"unknown scheduler class '{name}'"):
                read_scheduler({"_class_name": name})


def test_defaults_of_the_bundle_have_no_part_in_what_accelerate_draws() -> None:
    """The pipeline's scheduler may be exchanged for one of the same solver that says other things, or less."""
    import diffusers

    by_class: dict[str, list[Scheduler]] = {}
    compared = 0
    for seed in range(80):
        case = draw_case(seed)
        try:
            scheduler = getattr(diffusers, case.config["_class_name"]).from_config(dict(case.config))
            read = read_own(scheduler)
            asked = plan_keywords(scheduler, AskedSteps(steps=10))
            large = {"large": member(parametrisation=read.parametrisation, learned="variance" in read.options)}
            want = make_plan(manifest(large, noise=read.noise), **asked, schedule="large").rows
        except (BadInput, ValueError, NotImplementedError):  # test_random_configurations is about them
            continue
        others = by_class.setdefault(read.solver, [])
        for other in others:
            usual = Defaults(solver=other.solver, solver_options=dict(other.options), spacing=other.spacing)
            got = make_plan(manifest(large, noise=read.noise, defaults=usual), **asked, schedule="large").rows
            np.testing.assert_array_equal(got, want)
            compared += 1
        others.append(read)
    assert compared > 60
