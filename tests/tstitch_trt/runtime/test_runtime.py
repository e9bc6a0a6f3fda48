"""The runtime over real engines: tiny DiTs with random weights, exported and compiled in the test."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tstitch_trt
from support.compare import relative_error
from support.reference import walk
from support.tiny import TinyPair
from tstitch_engines.device.host_kernels import normal
from tstitch_engines.device.step_row import INITIAL_NOISE_STEP
from tstitch_engines.errors import BadEngine, BadInput, Busy, Cancelled, NotFinite, OutOfProfile, UnknownName
from tstitch_trt import Runtime
from tstitch_trt.plan.step_rows import with_inpainting
from tstitch_trt.runtime.memory import planned_memory


@pytest.fixture(scope="module")
def runtime(tiny_pair: TinyPair) -> Runtime:
    return tstitch_trt.load(tiny_pair.bundle, threads=1)


@pytest.fixture(scope="module")
def painting(tiny_pair: TinyPair) -> Runtime:
    """One that paints into pictures, for which it takes more memory."""
    return tstitch_trt.load(tiny_pair.bundle, threads=1)


SETTINGS = [
    {"solver": "ddim", "guidance": 1.0, "fraction": 0.4},
    {"solver": "ddim", "guidance": 3.0, "fraction": 0.4, "guided_channels": 3},
    {"solver": "ddpm", "guidance": 2.0, "fraction": 0.5, "variance": "learned"},
    {"solver": "dpmpp-2m", "guidance": {"large": 2.0}, "fraction": 0.4},
    {"solver": "dpmpp-3m-sde", "guidance": 2.0, "guidance_rescale": 0.7, "schedule": "large:2,small,large:2"},
    {"solver": "euler", "guidance": 4.0, "guidance_interval": (2, 6), "fraction": 0.3},
    {"solver": "pndm", "guidance": 2.0, "fraction": 0.4, "spacing": "leading"},
    {"solver": "pndm", "guidance": 1.0, "schedule": "small:4,large", "history": "reset"},
    {"solver": "unipc", "guidance": 3.0, "fraction": 0.4, "solver_options": {"order": 3}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['solver']}-{s['guidance']}")
def test_trajectory_equals_a_float64_walk_over_the_torch_members(
    runtime: Runtime, tiny_pair: TinyPair, settings: dict[str, object]
) -> None:
    """Engines, kernels, guidance, schedule and noise against PyTorch's modules and numpy: float32 rounding only."""
    labels, seeds, steps = [3, 7, 0], [11, 5, 2**63 + 9], 10
    result = runtime.sample(labels=labels, seeds=seeds, steps=steps, **settings)  # type: ignore[arg-type]
    plan = runtime.plan(steps=steps, **settings)
    size = int(np.prod(result.latents.shape[1:]))

    def noise(step: int) -> np.ndarray:
        return np.stack([normal(seed, step, size) for seed in seeds]).reshape(result.latents.shape)

    def model(x: np.ndarray, t: float, step: int) -> object:
        name = plan.schedule.names[step]
        cond = tiny_pair.run(name, x, t, labels)
        return (cond, tiny_pair.run(name, x, t, [10] * 3)) if plan.guided[step] else cond

    start = plan.init_scale * noise(INITIAL_NOISE_STEP)
    expected = walk(plan.rows, start, model, np.stack([noise(step) for step in range(steps)]))  # type: ignore[arg-type]
    assert relative_error(result.latents, expected[-1]) < 1e-4
    assert result.images is not None
    assert result.images.dtype == np.uint8
    assert result.images.shape == (3, 8, 8, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "ddim", "guidance": 2.0},
        {"solver": "pndm", "guidance": 1.0, "spacing": "leading"},
        {"solver": "unipc", "guidance": 1.0},
        {"solver": "euler-ancestral", "guidance": 1.0, "strength": 0.5},
        {"solver": "dpmpp-2m", "guidance": 1.0, "latents": True},
    ],
    ids=lambda s: s["solver"],
)
def test_a_mask_keeps_the_rest_of_the_picture(painting: Runtime, tiny_pair: TinyPair, settings: dict[str, Any]) -> None:
    """Against the walk that puts the known picture back after every step, as diffusers' inpainting with 4 channels."""
    labels, seeds, steps = [3, 7, 0], [11, 5, 2**63 + 9], 10
    shape = painting.sample(labels=0, steps=1).latents.shape[1:]
    size, rng = int(np.prod(shape)), np.random.default_rng(0)
    strength = settings.pop("strength", None)
    given = rng.standard_normal((3, *shape)).astype(np.float32) if settings.pop("latents", False) else None
    known = rng.uniform(-1, 1, (3, *shape)).astype(np.float32)
    mask = rng.uniform(0, 1, (3, *shape[1:])) < 0.5

    def noise(step: int) -> np.ndarray:
        return np.stack([normal(seed, step, size) for seed in seeds]).reshape(3, *shape)

    result = painting.sample(
        labels=labels, seeds=seeds, steps=steps, image=known, mask=mask, strength=strength, fraction=0.4,
        latents=given, **settings,
    )  # fmt: skip
    start = 0 if strength is None else round(steps * (1 - strength))
    plan = painting.plan(steps=steps, fraction=0.4, start=start, **settings)

    def model(x: np.ndarray, t: float, step: int) -> object:
        name = plan.schedule.names[start + step]
        cond = tiny_pair.run(name, x, t, labels)
        return (cond, tiny_pair.run(name, x, t, [10] * 3)) if plan.guided[start + step] else cond

    unit = noise(INITIAL_NOISE_STEP) if given is None else given
    state = plan.init_scale * unit
    if start:
        state = plan.table.a[start] * known + plan.table.s[start] * unit
    expected = walk(
        with_inpainting(plan.rows)[start:], state, model, np.stack([noise(step) for step in range(start, plan.steps)]),
        inpainting=(known, mask[:, None], unit),
    )  # fmt: skip
    assert relative_error(result.latents, expected[-1]) < 1e-4
    kept = np.broadcast_to(~mask[:, None], known.shape)
    np.testing.assert_array_equal(result.latents[kept], known[kept])
    assert relative_error(result.latents[~kept], known[~kept]) > 0.1


def test_fraction_ends_are_the_members_alone_bit_for_bit(tiny_pair: TinyPair, runtime: Runtime) -> None:
    """Against bundles that hold one member only, so that nothing of the other could have a part in it."""
    for fraction, name in ((0.0, "large"), (1.0, "small")):
        stitched = runtime.sample(labels=[1, 2], steps=10, fraction=fraction, guidance=2.0)
        with tstitch_trt.load(tiny_pair.alone(name), threads=1) as alone:
            single = alone.sample(labels=[1, 2], steps=10, schedule=name, guidance=2.0)
        np.testing.assert_array_equal(stitched.latents, single.latents)
        assert stitched.schedule.names == (name,) * 10


def test_same_seed_same_image_twice(runtime: Runtime) -> None:
    a = runtime.sample(labels=[1, 2, 3], steps=8, solver="euler-ancestral", seed=4)
    b = runtime.sample(labels=[1, 2, 3], steps=8, solver="euler-ancestral", seed=4)
    c = runtime.sample(labels=[1, 2, 3], steps=8, solver="euler-ancestral", seed=5)
    np.testing.assert_array_equal(a.latents, b.latents)
    assert relative_error(c.latents, a.latents) > 0.1
    assert a.seeds == (4, 5, 6)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_lane_is_the_same_alone_and_in_any_batch(runtime: Runtime, guidance: float) -> None:
    """13 images over engines of at most 8: chunks of 8 and 5, or of 4, 4, 4 and 1 when guided."""
    together = runtime.sample(labels=range(10), n=13, steps=8, solver="ddpm", guidance=guidance)
    assert together.labels == (*range(10), 0, 1, 2)
    for lane in (0, 6, 12):
        alone = runtime.sample(labels=lane % 10, seed=lane, steps=8, solver="ddpm", guidance=guidance)
        assert relative_error(alone.latents, together.latents[[lane]]) < 1e-4


def test_a_result_is_one_line_in_a_notebook(runtime: Runtime) -> None:
    shown = repr(runtime.sample(labels=[3, 5], steps=4, fraction=0.5))
    assert re.fullmatch(r"<Result: 2 images.*; small\[0:2\] large\[2:4\]; \d+ ms>", shown)


def test_what_to_draw_needs_its_keyword(runtime: Runtime) -> None:
    with pytest.raises(BadInput, match=r"sample got 'Bag' without a keyword\nhint: .*help\(Runtime.sample\)"):
        runtime.sample("Bag")  # type: ignore[call-arg, misc]


def test_latents_in_replace_the_noise_of_the_seeds(runtime: Runtime) -> None:
    shape = runtime.sample(labels=0, steps=1).latents.shape[1:]
    noise = np.stack([normal(s, INITIAL_NOISE_STEP, int(np.prod(shape))) for s in (3, 4)]).reshape(2, *shape)
    for solver in ("ddim", "euler"):  # euler scales it
        given = runtime.sample(labels=[5, 6], latents=noise, steps=6, solver=solver)
        drawn = runtime.sample(labels=[5, 6], seeds=[3, 4], steps=6, solver=solver)
        np.testing.assert_array_equal(given.latents, drawn.latents)


@pytest.mark.parametrize("output", ["host", "device"])
def test_what_is_given_for_each_image_follows_it_into_its_chunk(painting: Runtime, output: Any) -> None:
    """11 images in chunks of 8 and 3: latents, pictures and masks are the image's own, and so is its place."""
    count, rng = 11, np.random.default_rng(1)
    shape = painting.sample(labels=0, steps=1).latents.shape[1:]
    given, known = rng.standard_normal((2, count, *shape)).astype(np.float32)
    mask = rng.uniform(0, 1, (count, *shape[1:])) < 0.5
    settings: dict[str, Any] = {"steps": 4, "solver": "ddim", "guidance": 1.0, "output": output}

    def sample(some: slice, *, paint: bool) -> NDArray[np.float32]:
        picture = {"image": known[some], "mask": mask[some]} if paint else {}
        result = painting.sample(labels=[*range(10), 4][some], latents=given[some], **picture, **settings)
        return np.array(result.latents if output == "host" else result.device_latents)

    for paint in (False, True):
        together = sample(slice(count), paint=paint)
        for image in (0, 7, 8, 10):
            assert relative_error(sample(slice(image, image + 1), paint=paint)[0], together[image]) < 1e-4


def test_the_times_of_all_chunks_are_added(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch:
        marks = 0

        def mark(self) -> None:
            self.marks += 1

        def milliseconds(self) -> list[float]:
            return [2.0] * (self.marks - 1)

    monkeypatch.setattr(runtime.device, "stopwatch", Watch)
    result = runtime.sample(labels=0, n=13, steps=4, fraction=0.25, guidance=2.0)  # chunks of 4, 4, 4 and 1
    assert [(t.member, t.steps, t.ms) for t in result.timings] == [("small", 1, 8.0), ("large", 3, 8.0)]


def test_entering_in_the_middle_goes_on_bit_for_bit(runtime: Runtime) -> None:
    whole = runtime.sample(labels=[1, 2], steps=10, solver="ddpm", fraction=0.4, seed=9)
    states = {}
    for event in runtime.iterate(labels=[1, 2], steps=10, solver="ddpm", fraction=1.0, seed=9):
        states[event.step] = event.latents()
    rest = runtime.sample(labels=[1, 2], steps=10, solver="ddpm", fraction=0.4, seed=9, start_step=4, latents=states[4])
    np.testing.assert_array_equal(rest.latents, whole.latents)
    assert [(t.member, t.steps) for t in rest.timings] == [("large", 6)]


def test_a_multistep_solver_that_enters_in_the_middle_starts_again(runtime: Runtime) -> None:
    """It has no estimates of the steps before: with one timestep less before it, it does the same from there on."""
    asked: dict[str, Any] = {"labels": [1, 2], "solver": "dpmpp-2m", "seed": 9, "schedule": "large"}
    times = [900.0, 700.0, 500.0, 300.0, 100.0]
    for event in runtime.iterate(**asked, timesteps=times):
        if event.step == 2:
            state = event.latents()
    entered = runtime.sample(**asked, timesteps=times, start_step=2, latents=state)
    alone = runtime.sample(**asked, timesteps=times[2:], latents=state)
    np.testing.assert_array_equal(entered.latents, alone.latents)
    whole = runtime.sample(**asked, timesteps=times)
    assert np.abs(entered.latents - whole.latents).max() > 1e-3


def test_iterate_shows_each_step_and_returns_the_result(runtime: Runtime) -> None:
    walk = runtime.iterate(labels=[1, 2, 3], steps=6, fraction=0.5, solver="ddim")
    events = []
    while True:
        try:
            event = next(walk)
        except StopIteration as stop:
            result = stop.value
            break
        assert event.preview().shape == (3, 8, 8, 4)
        events.append(event)
    assert [(e.step, e.member) for e in events] == [(i + 1, "small" if i < 3 else "large") for i in range(6)]
    assert all(a.timestep > b.timestep for a, b in pairwise(events))
    quiet = runtime.sample(labels=[1, 2, 3], steps=6, fraction=0.5, solver="ddim")
    np.testing.assert_array_equal(result.latents, quiet.latents)
    assert [(t.member, t.steps) for t in result.timings] == [("small", 3), ("large", 3)]
    assert all(t.ms > 0 for t in result.timings)


@pytest.mark.parametrize("settings", [{"solver": "ddim"}, {"solver": "pndm", "solver_options": {"final": "zero"}}])
def test_the_last_estimate_is_the_result(runtime: Runtime, settings: dict[str, Any]) -> None:
    """At the end no noise is left: the estimate of the last step and the latent are the same. (PNDM estimates the
    noise, and what it then leaves of the latent is the preview.)"""
    for event in runtime.iterate(labels=[1, 2], steps=5, **settings):
        estimate, latents = event.estimate(), event.latents()
    assert relative_error(estimate, latents) < 1e-5


def test_cancel_by_callback_and_by_closing(runtime: Runtime) -> None:
    seen = []
    with pytest.raises(Cancelled, match="after step 3 of 8"):
        runtime.sample(labels=0, steps=8, callback=lambda e: (seen.append(e.step), e.step < 3)[1])
    assert seen == [1, 2, 3]
    walk = runtime.iterate(labels=0, steps=8)
    next(walk)
    with pytest.raises(Busy, match="this thread's own request"):
        runtime.sample(labels=0, steps=2)
    walk.close()
    runtime.sample(labels=0, steps=2)


def test_nan_is_named_with_step_and_member(tiny_pair: TinyPair) -> None:
    with tstitch_trt.load(tiny_pair.broken_large(), threads=1) as runtime:
        runtime.sample(labels=[1], steps=10, fraction=1.0)
        with pytest.raises(NotFinite, match=r"after step 5 of 10, made by member 'large'.*seed 7"):
            runtime.sample(labels=[1], steps=10, fraction=0.4, seed=7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": [10]}, "label 10 is out of range; allowed is 0 to 9"),
        ({"labels": [-1]}, "label -1 is out of range"),
        ({"labels": [1.5]}, "label 1.5"),
        ({"labels": []}, "labels is []: it has no values"),
        ({"n": 0}, "nothing to draw"),
        ({"seeds": [1, 2], "n": 3}, "do not agree"),
        ({"seeds": [-1]}, "seed -1 is out of range"),
        ({"seeds": [2**64]}, "seed 18446744073709551616 is out of range"),
        ({"latents": np.zeros((1, 3, 8, 8), np.float32)}, r"float32[1, 3, 8, 8]"),
        ({"latents": np.zeros((1, 4, 8, 8), np.int64)}, "int64"),
        ({"start_step": 3}, "without latents"),
        *[
            (
                {"start_step": 4, "latents": np.zeros((1, 4, 8, 8), np.float32), "solver": solver},
                "start_step of a request",
            )
            for solver in ("ddim", "dpmpp-2m")
        ],
        ({"fraction": 1.01}, "outside 0..1"),
        ({"guidance": -2.0}, "guidance -2"),
    ],
)
def test_bad_requests_name_value_and_way_out(runtime: Runtime, settings: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        runtime.sample(steps=4, **settings)  # type: ignore[arg-type]
    assert words in caught.value.message
    assert caught.value.hint


def test_latents_that_are_not_finite_are_refused(runtime: Runtime) -> None:
    latents = np.zeros((2, 4, 8, 8), np.float32)
    latents[1, 0, 3, 3] = np.nan
    with pytest.raises(NotFinite, match="image 1, before the first step"):
        runtime.sample(labels=0, steps=4, latents=latents)


def test_unknown_device_and_backend(tiny_pair: TinyPair) -> None:
    with pytest.raises(UnknownName, match="unknown device 'gpu'"):
        tstitch_trt.load(tiny_pair.bundle, device="gpu")
    with pytest.raises(UnknownName, match="did you mean 'onnxruntime'"):
        tstitch_trt.load(tiny_pair.bundle, backend="onnxruntme")
    with pytest.raises(BadEngine, match=r"no torch engine of member 'small'; it has: onnxruntime"):
        tstitch_trt.load(tiny_pair.bundle, backend="torch")


def test_guidance_needs_room_for_two_halves(tiny_pair: TinyPair) -> None:
    with tstitch_trt.load(tiny_pair.batch_one(), threads=1) as runtime:
        assert runtime.sample(labels=[1, 2], steps=2).latents.shape[0] == 2
        with pytest.raises(OutOfProfile, match="largest batch is 1"):
            runtime.sample(labels=[1], steps=2, guidance=2.0)


def test_bare_times_and_memory_are_reported(runtime: Runtime) -> None:
    assert len(runtime.time_member("large", 2, repeats=3)) == 3
    assert len(runtime.time_step_kernels(2, repeats=5, guided=True)) == 5
    assert runtime.load_ms > 0
    with pytest.raises(UnknownName, match="did you mean 'large'"):
        runtime.time_member("larg", 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "a NoneType"),
        ("latents", "a str"),
        (np.zeros((4, 8, 8), np.float32), "float32[4, 8, 8]"),
        (np.zeros((1, 3, 8, 8), np.float32), "float32[1, 3, 8, 8]"),
        (np.zeros((0, 4, 8, 8), np.float32), "float32[0, 4, 8, 8]"),
        (np.zeros((1, 4, 8, 8), np.int64), "int64[1, 4, 8, 8]"),
    ],
)
def test_what_is_no_latents_is_not_decoded(runtime: Runtime, given: Any, said: str) -> None:
    for verb in (runtime.decode, runtime.images):
        with pytest.raises(BadInput) as caught:
            verb(given)
        assert caught.value.message == f"latents are {said}; needed is float32[N, 4, H, W]"
        with pytest.raises(BadInput, match="a list can't be read as latents"):
            verb([[1.0], [1.0, 2.0]])  # type: ignore[arg-type]


def test_memory_is_what_inspect_plans(runtime: Runtime) -> None:
    memory = runtime.memory()
    engines = [record for member in runtime.manifest.members.values() for record in member.engines]
    weights = sum(part.bytes for record in engines for part in record.files)
    assert planned_memory(runtime.manifest) == {
        "onnxruntime": {"weights": weights, **{name: memory[name] for name in ("arena", "engine io")}},
    }
    assert memory["arena"] > 8 * 3 * 4 * 4 * 8 * 8  # 8 lanes of 4x8x8 float32: the latent and two estimates
    assert memory["engine io"] > 0
    assert memory["activations"] == 0  # ONNX Runtime does not say


def test_steps_on_the_cpu_allocate_and_copy_nothing(runtime: Runtime) -> None:
    calls = runtime.device.calls
    before = None
    for _ in runtime.iterate(labels=[1, 2], steps=6, guidance=2.0, fraction=0.5):
        assert before is None or calls == before
        before = calls.copy()
