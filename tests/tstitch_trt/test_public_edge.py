"""The public edge: every argument of every public function has a check, and whatever is passed gives a result or a
``TStitchError`` that names the argument, at once."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tstitch_trt
from support.absurd import ABSURD
from support.hand_made_parts import World
from tstitch_engines.checks import run_check
from tstitch_engines.errors import BadInput, TStitchError
from tstitch_export.build import build
from tstitch_trt import Runtime
from tstitch_trt.bench.bench import measure
from tstitch_trt.pipeline.accelerate import accelerate
from tstitch_trt.plan import options as plan_options
from tstitch_trt.plan.options import PlanKeywords
from tstitch_trt.quantise.quantise import quantise
from tstitch_trt.request.options import SampleKeywords
from tstitch_trt.study.calibrate.calibrate import calibrate
from tstitch_trt.study.divergence.divergence import profile
from tstitch_trt.study.evaluate.evaluate import evaluate
from tstitch_trt.study.search.search import search
from tstitch_trt.verify.verify import verify

SECONDS = 2.0
FUNCTIONS: list[Any] = [
    accelerate, tstitch_trt.load, tstitch_trt.make_plan,
    build, calibrate, evaluate, measure, profile, quantise, search, verify,
]  # fmt: skip
METHODS: list[Any] = [
    method
    for name, method in vars(Runtime).items()
    if inspect.isfunction(method) and not name.startswith("_") and len(inspect.signature(method).parameters) > 1
]
PLANS = (Runtime.plan,)  # all its keywords are PlanOptions'


@pytest.mark.parametrize("function", [*FUNCTIONS, *METHODS], ids=lambda function: str(function.__qualname__))
def test_every_parameter_has_a_check(function: Any) -> None:
    """A new keyword without one fails here."""
    parameters = inspect.signature(function).parameters.values()
    own = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD and each.name != "self"]
    if function in PLANS:
        assert not own
        return
    checks = next(each.checks for each in wrapped(function) if hasattr(each, "checks"))
    assert list(checks) == own


def wrapped(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def test_every_keyword_of_a_plan_has_a_check() -> None:
    assert set(plan_options._CHECKS) == set(plan_options.NAMES) == set(PlanKeywords.__annotations__)


CHECKS = [
    (function.__name__, name, check)
    for function in FUNCTIONS
    for name, check in next(each.checks for each in wrapped(function) if hasattr(each, "checks")).items()
]


@pytest.mark.parametrize(
    ("function", "name", "check"), CHECKS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_check_takes_a_value_or_names_its_argument(function: str, name: str, check: Callable[..., Any]) -> None:
    """Of functions whose work is long: nothing of it is run."""
    for made in ABSURD.values():
        started, told = time.perf_counter(), name
        try:
            run_check(check, made(), name)
        except BadInput as error:
            told = str(error)
        assert name in told
        assert len(told) < 1500
        assert time.perf_counter() - started < SECONDS


# --- the runtime, which is quick


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    bundle = World().bundle(tmp_path_factory.mktemp("world"))
    with tstitch_trt.load(bundle, threads=1) as loaded:
        yield loaded


PAINTED = {"image": np.zeros((64, 64, 3), np.uint8), "mask": np.ones((64, 64), bool)}
LATENTS, PICTURES = np.zeros((1, 4, 8, 8), np.float32), np.zeros((1, 3, 64, 64), np.float32)
BASE: dict[str, Any] = {"prompt": "a fox", "steps": 2, "schedule": "plain", "height": 64, "width": 64}
BASES: dict[str, dict[str, Any]] = {
    "sample": BASE, "iterate": BASE, "within_budget": {**BASE, "latency_budget_ms": 5.0}, "plan": {"steps": 2},
    "decode": {"latents": LATENTS}, "images": {"latents": LATENTS}, "encode": {"pictures": PICTURES},
    "time_member": {"name": "plain", "batch": 1, "repeats": 1}, "time_step_kernels": {"batch": 1, "repeats": 1},
    "swap_lora": {"name": "plain", "files": "x.safetensors"}, "restore": {}, "exclusive": {},
    "lora": {"name": "plain", "files": "x.safetensors"},
}  # fmt: skip
KEYWORDS = [
    (verb, name)
    for verb in BASES
    for name in {
        **dict.fromkeys(inspect.signature(getattr(Runtime, verb)).parameters),
        **(PlanKeywords.__annotations__ if verb == "plan" else {}),
        **(SampleKeywords.__annotations__ if verb in ("sample", "within_budget") else {}),
    }
    if name not in ("self", "keywords")
]


def test_every_verb_is_tried() -> None:
    assert {method.__name__ for method in METHODS} - {"close"} == set(BASES)


def call(runtime: Runtime, verb: str, asked: dict[str, Any]) -> None:
    found = getattr(runtime, verb)(**asked)
    if verb == "iterate":
        for _ in found:
            pass
    if isinstance(found, AbstractContextManager):
        with found:
            pass


def attempt(runtime: Runtime, verb: str, asked: dict[str, Any]) -> None:
    """Gives a result or a ``TStitchError``, in time."""
    started, told = time.perf_counter(), ""
    try:
        call(runtime, verb, asked)
    except TStitchError as error:
        told = str(error)
    assert len(told) < 2000
    taken = time.perf_counter() - started
    assert taken < SECONDS, f"{taken:.1f} s"


@pytest.mark.parametrize("verb", BASES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_value_gives_a_result_or_an_error_of_ours(runtime: Runtime, verb: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for of, name in KEYWORDS if of == verb]))
    value = data.draw(st.sampled_from(sorted(ABSURD)))
    picture = data.draw(
        st.sampled_from([{}, {"image": np.zeros((64, 64, 3), np.uint8), "mask": np.ones((64, 64), bool)}])
    )
    more = picture if verb in ("sample", "iterate", "within_budget") else {}
    attempt(runtime, verb, {**BASES[verb], **more, name: ABSURD[value]()})
