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
from tstitch_trt.serve import Engine
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
SERVED: list[Any] = [Engine.__init__, Engine.submit, Engine.close]
PLANS = (Runtime.plan,)  # all its keywords are PlanOptions'


@pytest.mark.parametrize("function", [*FUNCTIONS, *METHODS, *SERVED], ids=lambda function: str(function.__qualname__))
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
    "swap_lora": {"name": "plain", "files": "x.safetensors"}, "restore": {}, "exclusive": {}, "lanes": {"slots": 4},
    "lora": {"name": "plain", "files": "x.safetensors"}, "prompt_length": {"prompt": "a fox"},
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


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(World().bundle(tmp_path_factory.mktemp("served")), load={"threads": 1}) as made:
        yield made


SUBMITTED = [*inspect.signature(Engine.submit).parameters, *SampleKeywords.__annotations__]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([name for name in SUBMITTED if name not in ("self", "keywords")]),
    value=st.sampled_from(sorted(ABSURD)),
)
def test_any_value_given_to_an_engine_is_a_result_or_an_error_of_ours(engine: Engine, name: str, value: str) -> None:
    started, told = time.perf_counter(), ""
    try:
        if name == "options":
            engine.submit(ABSURD[value]()).result(SECONDS)
        else:
            engine.submit(**{**BASE, name: ABSURD[value]()}).result(SECONDS)
    except TStitchError as error:
        told = str(error)
    assert len(told) < 2000
    assert time.perf_counter() - started < SECONDS
    assert engine.state().ready


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"n": 10**8}, "n is 100000000; allowed is a whole number from 0 to 100000"),
        ({"n": 100_000, "steps": 10**6}, "GiB of memory are free"),
        ({"n": 100_000, "height": 128, "width": 128, "decode": False}, "GiB of memory are free"),
        ({"latents": np.broadcast_to(np.float32(0), (10**5, 4, 8, 8)), "steps": 10**6}, "GiB of memory are free"),
        ({"image": np.broadcast_to(np.uint8(0), (10**5, 64, 64, 3))}, "takes"),
        ({"prompt": ["x" * 20_000] * 501, "n": 501}, "10,020,000 characters in all; allowed are 10,000,000"),
        ({"guidance": 1e39}, "guidance is 1e+39; allowed is a number that float32 holds"),
        ({"eta": 1e300}, "eta is 1e+300"),
        ({"control": PAINTED["image"], "control_scale": 1e300}, "control_scale is 1e+300"),
        ({"schedule": "plain@t>=1e39,plain"}, "float32"),
        ({"schedule": "plain:1:g=1e39,plain"}, "float32"),
    ],
)
def test_what_is_absurd_in_product_or_beyond_float32_is_refused_at_once(
    runtime: Runtime, asked: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tstitch_trt.request.arrays.free_memory", lambda: 1 << 30)
    started = time.perf_counter()
    with pytest.raises(BadInput) as caught:
        runtime.sample(**{**BASE, **asked})
    assert words in caught.value.message
    assert time.perf_counter() - started < SECONDS


def test_the_steps_of_all_images_have_a_limit(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tstitch_trt.request.parse._MOST_STEPS", 10)
    with pytest.raises(BadInput, match="6 images of 2 steps are 12 steps; allowed are 10 in one request"):
        runtime.sample(**{**BASE, "n": 6})
