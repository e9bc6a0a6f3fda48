"""Schedules: the rules that turn shares into steps, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tstitch_engines.errors import BadInput, BadSchedule, UnknownName
from tstitch_trt.plan.schedule import ROUNDINGS, Schedule, check_fraction, fraction_text, resolve

MEMBERS = ("small", "base", "large")


def grid(steps: int) -> tuple[np.ndarray, np.ndarray]:
    timesteps = np.linspace(999, 0, steps).round()
    return timesteps, np.geomspace(157, 0.01, steps)


def make(text: object, steps: int = 50, members: tuple[str, ...] = MEMBERS, rounding: str | None = None) -> Schedule:
    timesteps, sigmas = grid(steps)
    return resolve(
        text,  # type: ignore[arg-type]
        members=members,
        timesteps=timesteps,
        sigmas=sigmas,
        train_steps=1000,
        rounding=rounding,
    )


def runs(schedule: Schedule) -> list[tuple[str, int]]:
    return [(s.name, s.stop - s.start) for s in schedule.segments]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("small:0.4,large", [("small", 20), ("large", 30)]),
        ("small:40%,large", [("small", 20), ("large", 30)]),
        ("small:0.4,base:0.2,large:0.4", [("small", 20), ("base", 10), ("large", 20)]),
        ("small:0.1,base:0.2,large", [("small", 5), ("base", 10), ("large", 35)]),
        ("small:20,large:30", [("small", 20), ("large", 30)]),
        ("large:5,small,large:5", [("large", 5), ("small", 40), ("large", 5)]),
        ("small:0,large", [("large", 50)]),
        ("small:0.0,large", [("large", 50)]),
        ("small:1.0,large", [("small", 50)]),
        ("large", [("large", 50)]),
        ("large:0.4,small", [("large", 20), ("small", 30)]),
    ],
)
def test_shares_become_steps(text: str, expected: list[tuple[str, int]]) -> None:
    schedule = make(text)
    assert runs(schedule) == expected
    assert schedule.text == text


@pytest.mark.parametrize(
    ("rounding", "small"), [("paper", 4), ("floor", 3), ("lcm", 4), ("timestep", 4), ("timestep-strict", 3)]
)
def test_the_rounding_is_named_and_differs(rounding: str, small: int) -> None:
    timesteps = np.array([900.0, 800, 700, 600, 500, 400, 300, 200, 100, 0])
    schedule = resolve(
        "small:0.37,large" if rounding in ("paper", "floor", "lcm") else "small:0.4,large",
        members=MEMBERS,
        timesteps=timesteps,
        sigmas=timesteps + 1,
        train_steps=1000,
        rounding=rounding,
    )
    assert schedule.names.count("small") == small
    assert rounding in schedule.rule


def test_lcm_is_one_step_more_than_floor_but_at_the_ends() -> None:
    found = [make(f"small:{r / 10},large", 4, rounding="lcm").counts.get("small", 0) for r in range(11)]
    assert found == [0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4]  # floor(4 r) + 1; at r = 0.5 of 4 steps 3, at r = 0.75 4
    shares = make("small:0.3,base:0.2,large", 10, rounding="lcm")
    assert runs(shares) == [("small", 4), ("base", 2), ("large", 4)]


@pytest.mark.parametrize(
    "schedule", ["small:20,large", "large", "small@t>=500,large", "base@end=0.8,large", ["small"] * 25 + ["large"] * 25]
)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_rounding_of_a_schedule_without_fractions_is_refused(schedule: str | list[str], rounding: str) -> None:
    make(schedule)
    with pytest.raises(BadSchedule, match=f"rounding '{rounding}' is given, and the schedule "):
        make(schedule, rounding=rounding)


def test_boundaries_in_timestep_and_sigma() -> None:
    timesteps, sigmas = grid(40)
    assert make("base@t>=875,large", 40).names.count("base") == np.count_nonzero(timesteps >= 875)
    assert make("base@sigma>1.5,large", 40).names.count("base") == np.count_nonzero(sigmas > 1.5)
    three = make("small@t>=800,base@t>=300,large", 40)
    assert [n for n, _ in runs(three)] == ["small", "base", "large"]
    assert three.rule == "boundary"


@pytest.mark.parametrize("what", ["t", "sigma"])
def test_a_step_on_the_boundary_belongs_to_the_first_member_where_it_says_so(what: str) -> None:
    levels = np.array([900.0, 875.0, 500.0, 100.0])
    for op, count in ((">=", 2), (">", 1)):
        schedule = resolve(
            f"base@{what}{op}875,large", members=MEMBERS, timesteps=levels, sigmas=levels, train_steps=1000
        )
        assert schedule.names.count("base") == count


@pytest.mark.parametrize("end", [0.0, 0.2, 0.55, 0.8, 1.0])
@pytest.mark.parametrize("steps", [10, 30, 50])
def test_base_refiner_cut_is_diffusers_denoising_end(end: float, steps: int) -> None:
    """diffusers keeps the base for the timesteps at or above T - end * T, rounded."""
    timesteps = np.arange(steps)[::-1] * (1000 // steps) + 1.0
    schedule = resolve(
        f"base@end={end},large", members=MEMBERS, timesteps=timesteps, sigmas=timesteps, train_steps=1000
    )
    cutoff = round(1000 - (end * 1000))
    assert schedule.names.count("base") == len([t for t in timesteps if t >= cutoff])


def test_lists_and_guidance_per_segment() -> None:
    names = ["small", "large", "large", "small"]
    assert make(names, 4).names == tuple(names)
    assert make("small,large,large,small", 4).names == tuple(names)
    guided = make("small:2:g=1.5,large", 5)
    assert guided.guidance == (1.5, 1.5, None, None, None)


@given(
    shares=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    steps=st.integers(1, 120),
    rounding=st.sampled_from(ROUNDINGS),
)
def test_every_step_has_a_member_and_shares_are_kept(shares: list[int], steps: int, rounding: str) -> None:
    total = sum(shares) or 1
    members = tuple(f"m{i}" for i in range(len(shares) + 1))
    text = ",".join(f"m{i}:{share / total * 0.9:.6f}" for i, share in enumerate(shares)) + f",{members[-1]}"
    schedule = make(text, steps, members, rounding)
    assert len(schedule.names) == steps
    assert set(schedule.names) <= set(members)
    assert list(schedule.names) == sorted(schedule.names)  # m0 first, as written
    if rounding == "paper":
        for i, share in enumerate(shares):
            assert abs(schedule.names.count(f"m{i}") - share / total * 0.9 * steps) <= 1.001


# --- texts from anybody

NAMES = st.sampled_from(["small", "large", "", "lrage", "_", "s.m-1", "é", "small " * 20])
NUMBERS = st.sampled_from(
    [
        "0",
        "1",
        "20",
        "50",
        "0.4",
        "40%",
        "1e400",
        "-1",
        "+.5",
        "1e-400",
        "9" * 5000,
        "nan",
        "1e39",
        "e",
        "%",
        "0.4%%",
        "",
    ]
)
SEGMENTS = st.builds(
    "".join,
    st.tuples(
        NAMES,
        st.sampled_from(["", ":", "@t>=", "@t>", "@sigma>=", "@sigma>", "@end=", "@", "::", "@x>="]),
        NUMBERS,
        st.sampled_from(["", ":g=1", ":g=", ":g=1e39", ":g=nan", ":g=-1", " "]),
    ),
)
NEAR_MISSES = st.lists(SEGMENTS, max_size=5).map(",".join)
TEXTS = NEAR_MISSES | st.text(st.characters(exclude_categories=()), max_size=40)


@settings(max_examples=150, deadline=2000, derandomize=True)
@given(text=TEXTS, rounding=st.sampled_from(ROUNDINGS))
def test_any_text_is_a_schedule_or_a_bad_one(text: str, rounding: str) -> None:
    told = ""
    try:
        schedule = make(text, 50, ("small", "large"), rounding)
    except BadInput as error:
        told = str(error)
    else:
        assert len(schedule.names) == 50
    assert len(told) < 1000


@pytest.mark.parametrize("text", ["small," * 50_000, "small:1," * 12_000 + "large", ":" * 100_000, "a" * 100_000])
def test_a_long_text_is_refused_at_once(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        make(text, 50, ("small", "large"), "paper")
    assert len(str(caught.value)) < 1000


@given(fraction=st.floats(0, 1), steps=st.integers(1, 200))
def test_fraction_is_the_papers_round(fraction: float, steps: int) -> None:
    schedule = make(fraction_text(fraction, ("small", "large")), steps, ("small", "large"))
    assert abs(schedule.names.count("small") - fraction * steps) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("small:1.5,large", "outside 0..1"),
        ("small:-1,large", "outside 0..1"),
        ("small:20,large:20", "add up to 40 for 50 steps"),
        ("small:60,large", "add up to 60 for 50 steps"),
        ("small:0.4,large:0.4", "add up to 0.8"),
        ("small:0.8,base:0.4,large", "add up to 1.2"),
        ("small:0.4,base:10,large", "mixes fractions"),
        ("small,large", "lists 2 names for 50 steps"),
        ("small,base:5,large", "more than one segment"),
        ("small@t>=875", "no member after"),
        ("small@t>=300,base@t>=800,large", "comes before"),
        ("small@v>=3,large", "can't be read"),
        ("", "can't be read"),
        ("small:0.4;large", "can't be read"),
    ],
)
def test_bad_schedules_name_the_value(text: str, words: str) -> None:
    with pytest.raises(BadSchedule) as caught:
        make(text)
    assert words in caught.value.message
    assert caught.value.hint


def test_unknown_members_and_roundings_name_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'large'"):
        make("small:0.4,lagre")
    with pytest.raises(UnknownName, match="did you mean 'floor'"):
        make("small:0.4,large", rounding="flor")


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fractions_outside_are_refused(fraction: float) -> None:
    with pytest.raises(BadSchedule, match=r"outside 0\.\.1"):
        check_fraction(fraction, "fraction")
