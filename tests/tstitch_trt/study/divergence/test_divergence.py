"""profile: members at the states of another's trajectory, orders that are really run, and the schedule suggested."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tstitch_trt
from support.command import Command, refused
from support.hand_made import CHANNELS, made_member, text_bundle
from support.hand_made_parts import World, word_tokenizer
from support.reference import guide, walk
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import NoiseScheduleSpec, TextInputs
from tstitch_engines.device.host_kernels import normal
from tstitch_engines.device.step_row import INITIAL_NOISE_STEP, ROW
from tstitch_engines.errors import BadInput, Unavailable, UnknownName
from tstitch_trt import Runtime
from tstitch_trt.plan.plan import Plan
from tstitch_trt.study.divergence.divergence import profile, profile_solver
from tstitch_trt.study.divergence.orders import (
    MEMBER_ORDERS,
    choose_order,
    counted,
    knee,
    order_names,
    order_of,
    order_text,
    small_counts,
)
from tstitch_trt.study.divergence.trajectories import MemberTrajectories, batches, images_of
from tstitch_trt.study.records import Divergence, OrderTrial
from tstitch_trt.study.statistics import compare_rows
from tstitch_trt.study.store import load_studies, weights_of

LABELS, SEEDS = [0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def runtime(tiny_pair: TinyPair) -> Iterator[Runtime]:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def noise(seeds: list[int], step: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([normal(seed, step, int(np.prod(shape))) for seed in seeds]).reshape(len(seeds), *shape)


def estimates(plan: Plan, states: np.ndarray, model: Any) -> list[np.ndarray]:
    """``D = p x + q m`` of each row at the state before it."""
    found = []
    for step, row in enumerate(plan.rows):
        x = states[step]
        cond, uncond = model(row[ROW["C_IN"]] * x, float(row[ROW["T"]]), step)
        m = guide(row, cond[:, : x.shape[1]], uncond[:, : x.shape[1]])
        found.append(row[ROW["P"]] * x + row[ROW["Q"]] * m)
    return found


def plain_compare(got: np.ndarray, want: np.ndarray) -> tuple[list[float], list[float]]:
    cosines, distances = [], []
    for a, b in zip(got, want, strict=True):
        a, b = a.ravel(), b.ravel()
        cosines.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
        distances.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return cosines, distances


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler"])
def test_divergence_is_that_of_torch_members_walked_in_numpy(
    runtime: Runtime, tiny_pair: TinyPair, solver: str
) -> None:
    """An eps and a v member, guided, 6 seeds in calls of 4: against PyTorch's modules in float64."""
    study = profile(runtime, samples=6, seed=4, steps=5, solver=solver, guidance=2.0)
    settings: dict[str, Any] = {"steps": 5, "solver": solver, "guidance": 2.0}
    plans = {name: runtime.plan(schedule=name, **settings) for name in ("small", "large")}

    def member(name: str) -> Any:
        return lambda x, t, step: (tiny_pair.run(name, x, t, LABELS), tiny_pair.run(name, x, t, [10] * 6))

    shape = (4, 8, 8)
    start = plans["large"].init_scale * noise(SEEDS, INITIAL_NOISE_STEP, shape)
    unit = np.stack([noise(SEEDS, step, shape) for step in range(5)])
    states = walk(plans["large"].rows, start, member("large"), unit)
    ours, theirs = (estimates(plans[name], states, member(name)) for name in ("small", "large"))
    assert [s.step for s in study.members["small"]] == list(range(5))
    for step, found in enumerate(study.members["small"]):
        cosines, distances = plain_compare(ours[step], theirs[step])
        assert found.cosine == pytest.approx(np.median(cosines), abs=1e-5)
        assert found.rel_l2 == pytest.approx(np.median(distances), rel=1e-4)
        assert found.p10 == pytest.approx(np.percentile(distances, 10), rel=1e-4)
        assert found.p90 == pytest.approx(np.percentile(distances, 90), rel=1e-4)
        assert found.timestep == plans["large"].table.t[step]
    for trial in study.orders:
        names = order_of(trial)
        plan = runtime.plan(schedule=trial.schedule, **settings)
        assert plan.schedule.names == names
        found_latents = walk(plan.rows, start, lambda x, t, step, n=names: member(n[step])(x, t, step), unit)[-1]
        _, distances = plain_compare(found_latents, states[-1])
        assert trial.latent_error == pytest.approx(np.median(distances), rel=1e-3)


def test_a_member_compared_with_itself_does_not_differ_at_all(runtime: Runtime) -> None:
    asked = images_of(runtime.manifest, samples=3, seed=1).keywords(runtime.manifest, 0, 3, ())
    walked = MemberTrajectories(
        runtime,
        images=asked,
        settings={"steps": 4, "guidance": 2.0, "solver": "ddpm"},
        steps=4,
    )
    for name in ("large", "small"):
        wanted = walked.whole(name)
        for step, want in enumerate(wanted):
            got = walked.estimate(name, name, step)
            assert got is not None
            cosine, distance = compare_rows(got, want)
            assert (cosine == 1).all()
            assert (distance == 0).all()


def test_trials_that_share_a_beginning_equal_whole_runs_bit_for_bit(runtime: Runtime) -> None:
    settings = {"steps": 6, "guidance": 2.0, "solver": "ddpm"}
    asked = images_of(runtime.manifest, samples=4, seed=3).keywords(runtime.manifest, 0, 4, ())
    walked = MemberTrajectories(runtime, images=asked, settings=settings, steps=6)
    walked.whole("small")
    walked.whole("large")
    for order in MEMBER_ORDERS:
        names = order_names(order, 3, 6, small="small", large="large")
        alone = runtime.sample(schedule=list(names), decode=False, **asked, **settings)
        np.testing.assert_array_equal(walked.final(names), alone.latents)


def test_what_is_kept_and_said(tiny_pair: TinyPair, runtime: Runtime) -> None:
    shares: list[float] = []
    study = profile(runtime, samples=2, steps=10, progress=lambda text, share: shares.append(share))
    assert study.weights == weights_of(runtime.manifest)
    assert (study.reference, study.solver, study.guidance) == ("large", "ddim", 1.0)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    by_order = {order: [t for t in study.orders if t.order == order] for order in (*MEMBER_ORDERS, "small-only")}
    assert len(by_order[study.order]) >= 9
    equal = {t.share: [order_of(other).count("small") for other in study.orders if other.share == t.share]
             for t in study.orders}  # fmt: skip
    assert all(set(counts) == {round(share * 10)} for share, counts in equal.items())
    plan = runtime.plan(schedule=study.suggested, steps=10)
    assert counted(plan.schedule.names) in [t.schedule for t in study.orders] or set(plan.schedule.names) == {"large"}
    assert "evaluate" in study.reason
    assert study.reason.endswith("2 seeds are few: it may be by chance.")


def test_the_reference_may_be_any_member(runtime: Runtime) -> None:
    study = profile(runtime, samples=2, steps=4, reference="small")
    assert list(study.members) == ["large"]
    assert study.reference == "small"
    alone = next(t for t in study.orders if t.order == "small-only")
    assert order_of(alone) == ("large",) * 4  # the one that takes the small part


# --- orders and the knee


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 60), st.data())
def test_every_order_has_as_many_small_steps(steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, steps))
    for order in MEMBER_ORDERS:
        names = order_names(order, count, steps, small="s", large="l")
        assert len(names) == steps
        assert names.count("s") == count
        assert order_of(OrderTrial(order=order, schedule=counted(names), latent_error=0, p10=0, p90=0)) == names
    assert all(0 < count < steps for count in small_counts((0.0, 0.01, 0.4, 1.0), steps))


def trial(order: str, share: float, error: float) -> OrderTrial:
    count = round(share * 20)
    names = order_names(order, count, 20, small="small", large="large")
    return OrderTrial(order=order, share=share, schedule=counted(names), latent_error=error, p10=error, p90=error)


def test_the_order_with_the_least_error_wins() -> None:
    trials = [
        trial(order, share, (i + 1) * share) for i, order in enumerate(reversed(MEMBER_ORDERS)) for share in (0.25, 0.5)
    ]
    assert choose_order(trials) == MEMBER_ORDERS[-1]
    assert choose_order([t for t in trials if t.order != MEMBER_ORDERS[-1]]) == MEMBER_ORDERS[-2]


def test_the_knee_is_farthest_below_the_line() -> None:
    shares = np.arange(1, 100) / 100
    assert knee([(s, 2 * s**2) for s in shares], 2.0) == pytest.approx(0.5)  # of a parabola in the middle
    assert knee([(s, 0.0 if s <= 0.3 else 2 * (s - 0.3) / 0.7) for s in shares], 2.0) == pytest.approx(0.3)
    assert knee([(s, 2 * np.sqrt(s)) for s in shares], 2.0) == 0
    assert knee([], 1.0) == 0


def test_orders_as_shares() -> None:
    assert order_text("small-first", 0.4, small="s", large="l") == "s:0.4,l"
    assert order_text("large-first", 0.4, small="s", large="l") == "l:0.6,s"
    assert order_text("large-small-large", 0.4, small="s", large="l") == "l:0.3,s:0.4,l"
    assert order_text("small-large-small", 0.4, small="s", large="l") == "s:0.2,l:0.6,s"


def test_the_built_in_pair_goes_small_first(fashion_bundle: Path) -> None:
    """The paper's order wins with a clear lead, and the share is well inside."""
    with tstitch_trt.load(fashion_bundle, threads=1) as runtime:
        study = profile(runtime, samples=4, steps=10, guidance=1.0)
    assert study.order == "small-first"
    errors = {(t.order, t.share): t.latent_error for t in study.orders}
    assert 1.5 * errors["small-first", 0.5] < errors["large-first", 0.5]
    assert 0.2 <= float(study.suggested.removeprefix("small:").removesuffix(",large")) <= 0.7


# --- text


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``first`` eps; ``last`` v in another latent scaling, trained on another noise schedule."""
    folder = tmp_path_factory.mktemp("texts")
    world, text = World(), TextInputs(hidden=("text_encoder", "text_encoder_2"), width=9)
    inputs: dict[str, tuple[int | str, ...]] = {"encoder_hidden_states": ("T", 9)}
    own = NoiseScheduleSpec(kind="linear")
    members = {
        "first": made_member("first", inputs=inputs, text=text),
        "last": made_member("last", inputs=inputs, text=text, parametrisation="v", latent_ratio=1.25, noise=own),
    }
    names = ("text_encoder", "text_encoder_2")
    tokenizer = word_tokenizer(folder / "tokenizer.json")
    return text_bundle(
        folder / "texts.bundle", members, parts={name: world.parts[name] for name in names},
        files={name: {"tokenizer": tokenizer} for name in names},
    )  # fmt: skip


def test_prompts_and_members_of_other_conventions(texts: Bundle) -> None:
    prompts = ("a red fox", "blue sky")
    with tstitch_trt.load(texts, threads=1) as runtime:
        study = profile(runtime, samples=3, steps=4, guidance=3.0, prompts=prompts, reference="first")
        plans = {n: runtime.plan(schedule=n, steps=4, guidance=3.0) for n in ("first", "last")}
    assert study.prompts == prompts
    world = World()
    hidden = np.stack([world.hidden(text) for text in ("a red fox", "blue sky", "a red fox")])
    empty = np.stack([world.hidden("")] * 3)
    made = {
        "first": made_member("first", inputs={"encoder_hidden_states": ("T", 9)}),
        "last": made_member("last", inputs={"encoder_hidden_states": ("T", 9)}),
    }

    def member(name: str) -> Any:
        return lambda x, t, step: tuple(made[name](x, t, {"encoder_hidden_states": rows}) for rows in (hidden, empty))

    shape = (CHANNELS, 8, 8)
    start = plans["first"].init_scale * noise([0, 1, 2], INITIAL_NOISE_STEP, shape)
    states = walk(plans["first"].rows, start, member("first"), np.zeros((4, 3, *shape)))
    ours, theirs = (estimates(plans[name], states, member(name)) for name in ("last", "first"))
    for step, found in enumerate(study.members["last"]):
        _, distances = plain_compare(ours[step], theirs[step])
        assert found.rel_l2 == pytest.approx(np.median(distances), rel=1e-3)


# --- bad input


def test_bad_input(runtime: Runtime, tiny_pair: TinyPair) -> None:
    for changes, kind, words in (
        ({"samples": 1}, BadInput, "1 samples"),
        ({"steps": 3}, BadInput, "3 steps are too few"),
        ({"reference": "larg"}, UnknownName, "larg"),
        ({"solver": "dpmpp-2m"}, BadInput, "needs the estimates of the steps before"),
        ({"solver": "pndm"}, BadInput, "needs the estimates of the steps before"),
        ({"prompts": ["a fox"]}, BadInput, "draws classes, not texts"),
    ):
        with pytest.raises(kind) as caught:
            profile(runtime, **changes)  # type: ignore[arg-type]
        assert words in caught.value.message
        assert caught.value.hint
    with (
        tstitch_trt.load(tiny_pair.alone("large"), threads=1) as alone,
        pytest.raises(BadInput, match="one member"),
    ):
        profile(alone)


def test_a_bundle_that_paints_is_refused(tmp_path: Path) -> None:
    manifest = World().bundle(tmp_path).manifest
    with pytest.raises(Unavailable, match=r"'painter'.*paints into pictures"):
        images_of(manifest, samples=2, seed=0)


def test_the_usual_solver_gives_way_where_it_has_a_memory(runtime: Runtime) -> None:
    import msgspec

    manifest = runtime.manifest
    assert profile_solver(manifest, None) == "ddim"
    other = msgspec.structs.replace(manifest, defaults=msgspec.structs.replace(manifest.defaults, solver="unipc"))
    assert profile_solver(other, None) == "ddim"
    assert profile_solver(other, "unipc") == "unipc"  # refused later, with its reason
    one = msgspec.structs.replace(manifest, defaults=msgspec.structs.replace(manifest.defaults, solver="ddpm"))
    assert profile_solver(one, None) == "ddpm"


def test_batches_fit_one_engine_call(runtime: Runtime) -> None:
    assert batches(runtime, 2.0, 9) == [range(0, 4), range(4, 8), range(8, 9)]
    assert batches(runtime, 1.0, 9) == [range(0, 8), range(8, 9)]


def test_a_plain_member_beside_a_distilled_reference(tmp_path: Path) -> None:
    """One is guided by a second half and the other is not: as many images at once as both have room for."""
    world, text = World(), TextInputs(hidden=("text_encoder", "text_encoder_2"), width=9)
    hidden: dict[str, tuple[int | str, ...]] = {"encoder_hidden_states": ("T", 9)}
    members = {
        "plain": made_member("plain", inputs=hidden, text=text),
        "lcm": made_member("lcm", inputs={**hidden, "timestep_cond": (32,)}, text=text, guidance_embedding=32),
    }
    names = ("text_encoder", "text_encoder_2")
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json")
    bundle = text_bundle(
        tmp_path / "lcm.bundle", members, parts={name: world.parts[name] for name in names},
        files={name: {"tokenizer": tokenizer} for name in names},
    )  # fmt: skip
    with tstitch_trt.load(bundle, threads=1) as runtime:
        count = runtime.splitting.most(guided=False)
        study = profile(runtime, samples=count, steps=4, guidance=3.0, prompts=("a red fox",))
        alone = profile(runtime, samples=2, steps=4, guidance=3.0, prompts=("a red fox",))
    assert (study.reference, len(study.seeds), len(study.members["plain"])) == ("lcm", count, 4)
    assert len(alone.members["plain"]) == 4


# --- the command


def test_the_command(tiny_pair: TinyPair, command: Command, tmp_path: Path) -> None:
    plot = tmp_path / "divergence.png"
    words = ["profile", tiny_pair.bundle, "--samples", 2, "--steps", 6, "--threads", 1, "--seed", 3]
    done = command(*words, "--plot", plot, "--json", "--traceback")
    assert done.code == 0, done.err
    with Image.open(plot) as picture:
        assert picture.size[0] > picture.size[1]
    bundle = tstitch_trt.load(tiny_pair.bundle, threads=1).bundle
    (kept,) = load_studies(bundle, Divergence)
    assert done.json["suggested"] == kept.suggested
    assert done.json["seeds"] == [3, 4]
    again = command(*shlex.split(kept.command)[1:], "--threads", 1, "--json")
    assert again.code == 0
    assert again.json["members"] == done.json["members"]
    table = command(*words)
    assert kept.suggested in table.out
    assert "latent error" in table.out


def test_an_interrupted_profile_keeps_what_was_there(
    tiny_pair: TinyPair, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["profile", tiny_pair.bundle, "--samples", 2, "--steps", 4, "--threads", 1]
    assert command(*words).code == 0
    (place,) = [
        path
        for path in (tiny_pair.bundle / "studies").glob("divergence-*.json")
        if json.loads(path.read_text())["steps"] == 4
    ]
    before = json.loads(place.read_text())
    original = MemberTrajectories.final

    def interrupted(self: MemberTrajectories, names: Any) -> Any:
        if names[0] != names[-1]:
            raise KeyboardInterrupt
        return original(self, names)

    monkeypatch.setattr(MemberTrajectories, "final", interrupted)
    assert command(*words).code == 130
    assert json.loads(place.read_text()) == before


def test_bad_words(tiny_pair: TinyPair, command: Command, tmp_path: Path) -> None:
    refused(command("profile", tiny_pair.bundle, "--reference-member", "larg"), "larg", "large")
    refused(command("profile", tiny_pair.bundle, "--samples", 1), "1 samples", "--samples 8")
    refused(command("profile", tiny_pair.bundle, "--solver", "unipc"), "unipc", "--solver ddim")
    refused(command("profile", tiny_pair.alone("small")), "one member", "'small'")
    refused(command("profile", tiny_pair.bundle, "--prompts", tmp_path / "none.txt"), "none.txt")
    refused(command("profile", tiny_pair.bundle, "--plot", tmp_path / "a.jpg"), ".jpg")
