"""The record of a plan's options: what is said, what is not, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from support.manifests import manifest
from tstitch_engines.bundle.manifest import Conditioning, Defaults
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.plan.options import PlanKeywords, PlanOptions
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.solvers import SolverOptions

DEFAULTS = Defaults(solver="euler", solver_options={"final": "zero", "sigmas": "karras"}, spacing="leading", steps=20)


def test_the_record_has_the_keywords_of_the_public_functions() -> None:
    assert [field.name for field in fields(PlanOptions)] == list(PlanKeywords.__annotations__)
    assert all(field.default is None for field in fields(PlanOptions))


def test_only_what_was_said_is_explicit() -> None:
    assert PlanOptions().explicit() == {}
    said = PlanOptions(steps=np.int64(4), guidance=1, guidance_rescale=0.0, timesteps=np.array([900.0, 100.0]))  # type: ignore[arg-type]
    assert said.explicit() == {"steps": 4, "guidance": 1.0, "guidance_rescale": 0.0, "timesteps": (900.0, 100.0)}
    assert said.asked_steps(manifest()) == 2
    assert PlanOptions(steps=7).on_top_of(said).explicit() == {**said.explicit(), "steps": 7}
    assert make_plan(manifest(), PlanOptions(steps=9, fraction=0.5), steps=6).steps == 6


def test_a_default_that_does_not_fit_is_left_out_and_one_that_was_said_is_refused() -> None:
    usual = manifest(defaults=DEFAULTS)
    assert make_plan(usual).solver.sigmas == "karras"
    other = make_plan(usual, solver="lcm", steps=4).solver  # has a spacing of its own
    assert (other.spacing, other.sigmas) == (None, None)
    with pytest.raises(BadInput, match="does not use spacing='leading'"):
        make_plan(usual, solver="lcm", steps=4, spacing="leading")
    assert make_plan(usual, timesteps=[900, 300]).solver.sigmas is None
    with pytest.raises(BadInput, match="sigmas='karras' would be ignored"):
        make_plan(usual, timesteps=[900, 300], sigmas="karras")
    with pytest.raises(BadInput, match="sigmas='karras' would be ignored"):
        make_plan(usual, timesteps=[900, 300], solver=SolverOptions(name="euler", sigmas="karras"))
    unguidable = manifest(defaults=Defaults(guidance=4.0), conditioning=Conditioning(classes=10, null=None))
    assert not any(make_plan(unguidable).guided)
    with pytest.raises(BadInput, match="without a null class"):
        make_plan(unguidable, guidance=4.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": "a"}, "steps is 'a'; allowed is a whole number"),
        ({"steps": True}, "steps is True"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"steps": 10**9}, "steps is 1000000000; allowed is a whole number from 1 to 1000000"),
        ({"steps": 10**6000}, "steps is something of type int"),
        ({"guidance": "x"}, "guidance is 'x'; allowed is a number"),
        ({"guidance": [2.0]}, "guidance is [2.0]"),
        ({"guidance": {"large": None}}, "guidance of 'large' is None"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale is nan; allowed is a number from 0 to 1"),
        ({"guidance_interval": 3}, "guidance_interval is 3; allowed are two whole numbers"),
        ({"guidance_interval": (0, 1.5)}, "STOP of guidance_interval is 1.5"),
        ({"guided_channels": -1}, "guided_channels is -1"),
        ({"schedule": 3}, "schedule is 3; allowed is a text, or a list"),
        ({"schedule": []}, "schedule is []"),
        ({"schedule": ["small", 2]}, "a member in schedule is 2"),
        ({"schedule": "small\ud800"}, "half of a surrogate pair"),
        ({"fraction": "0.4"}, "fraction '0.4' is outside 0..1"),
        ({"timesteps": 900}, "timesteps is 900"),
        ({"timesteps": [900, None]}, "timesteps is None"),
        ({"solver": 3}, "solver is 3"),
        ({"solver_options": [1]}, "solver_options is [1]; allowed is a dict"),
        ({"eta": True}, "eta is True"),
        ({"rounding": "up"}, "unknown rounding 'up'"),
        ({"spacing": 1}, "unknown spacing '1'"),
        ({"start": -1}, "start is -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_type_is_refused_when_the_record_is_made(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        PlanOptions(**options)
    assert words in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("name", "hint"),
    [("num_inference_steps", "did you mean steps=?"), ("guidance_scale", "did you mean guidance=?"),
     ("solvr", "did you mean 'solver'?")],
)  # fmt: skip
def test_an_unknown_keyword_names_ours(name: str, hint: str) -> None:
    with pytest.raises(UnknownName) as caught:
        make_plan(manifest(), **{name: 3})
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    "options",
    [{"s_noise": 10**400}, {"steps_offset": 10**30}, {"uncorrected": "9" * 5000}, {"uncorrected": "²"}, {"final": [1]}],
    ids=lambda options: next(iter(options)),
)
def test_values_of_solver_options_are_bounded(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        make_plan(manifest(), solver="unipc", solver_options=options)


def test_numbers_and_lists_are_taken_as_a_person_has_them() -> None:
    """numpy's numbers, arrays of no dimension, iterators: as Python's own."""
    made = PlanOptions(
        steps=np.int16(4),  # type: ignore[arg-type]
        guidance=np.array(1.5),  # type: ignore[arg-type]
        timesteps=(t for t in (900, np.float32(300))),  # type: ignore[arg-type]
        schedule=iter(["small", np.str_("large")]),  # type: ignore[arg-type]
        guidance_interval=np.array([0, 1]),  # type: ignore[arg-type]
    )
    assert (made.steps, made.guidance, made.timesteps) == (4, 1.5, (900.0, 300.0))
    assert (made.schedule, made.guidance_interval) == (("small", "large"), (0, 1))
    solver = SolverOptions(name="unipc", order=np.int64(2), s_noise=np.float32(0.5))  # type: ignore[arg-type]
    assert (type(solver.order), type(solver.s_noise)) == (int, float)
