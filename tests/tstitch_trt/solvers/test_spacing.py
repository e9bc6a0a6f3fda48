"""Spacings: published lists, invariants over step counts, refusals (diffusers: test_solvers_diffusers)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.solvers.spacing import SIGMA_SPACINGS, SPACINGS, check_timesteps, space_sigmas, space_timesteps


@given(
    st.sampled_from(SPACINGS),
    st.integers(1, 1200),
    st.integers(1, 1200),
    st.booleans(),
    st.booleans(),
)
def test_timesteps_fall_inside_the_schedule(
    spacing: str, steps: int, train_steps: int, extra_point: bool, rounded: bool
) -> None:
    assume(steps + extra_point <= train_steps)
    t = space_timesteps(spacing, steps, train_steps=train_steps, extra_point=extra_point, rounded=rounded)
    assert t.shape == (steps,)
    assert (np.diff(t) < 0).all()
    assert t[0] <= train_steps - 1
    assert t[-1] >= 0
    if rounded and spacing != "uniform":
        np.testing.assert_array_equal(t, np.round(t))
    if spacing != "leading":
        assert t[0] == train_steps - 1


def improved_ddpm(train_steps: int, steps: int) -> list[int]:
    """The respacing as Improved DDPM words it: a fractional stride, summed up and rounded, both ends included."""
    stride, at, taken = (train_steps - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        taken.append(round(at))
        at += stride
    return taken[::-1]


@given(st.integers(2, 1000))
def test_dit_is_the_respacing_of_the_published_samplers(steps: int) -> None:
    assert space_timesteps("dit", steps, train_steps=1000).tolist() == improved_ddpm(1000, steps)


def test_known_lists() -> None:
    def of(spacing: str, steps: int, *, steps_offset: int = 0, extra_point: bool = False) -> Any:
        t = space_timesteps(spacing, steps, train_steps=1000, steps_offset=steps_offset, extra_point=extra_point)
        return t.tolist()

    assert of("dit", 5) == [999, 749, 500, 250, 0]
    assert of("leading", 5) == [800, 600, 400, 200, 0]
    assert of("leading", 5, steps_offset=1) == [801, 601, 401, 201, 1]
    assert of("trailing", 5) == [999, 799, 599, 399, 199]
    assert of("linspace", 3) == [999, 500, 0]
    assert of("linspace", 4, extra_point=True) == [999, 749, 500, 250]


@pytest.mark.parametrize("spacing", ["dit", "linspace", "trailing"])
def test_one_step_starts_from_noise(spacing: str) -> None:
    assert space_timesteps(spacing, 1, train_steps=1000).tolist() == [999]


@given(st.sampled_from(SIGMA_SPACINGS), st.integers(1, 200), st.floats(1e-3, 1), st.floats(1.5, 2e4))
def test_sigmas_fall_from_end_to_end(spacing: str, steps: int, low: float, high: float) -> None:
    sigma = space_sigmas(spacing, steps, sigma_min=low, sigma_max=high)
    assert sigma.shape == (steps,)
    assert (np.diff(sigma) < 0).all()
    assert sigma[0] == pytest.approx(high)
    assert steps == 1 or sigma[-1] == pytest.approx(low)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [0, -1, 101])
def test_step_counts_that_do_not_fit_are_refused(spacing: str, steps: int) -> None:
    with pytest.raises(BadInput, match=r"allowed is 1 to 100\n.*hint: ask for 1 to 100 steps"):
        space_timesteps(spacing, steps, train_steps=100)


def test_an_extra_point_needs_room() -> None:
    with pytest.raises(BadInput, match="allowed is 1 to 99"):
        space_timesteps("leading", 100, train_steps=100, extra_point=True)
    assert space_timesteps("trailing", 100, train_steps=100, extra_point=True).size == 100


def test_offsets_past_the_end_are_refused() -> None:
    assert space_timesteps("leading", 50, train_steps=1000, steps_offset=19)[0] == 999
    with pytest.raises(BadInput, match="allowed is 0 to 19"):
        space_timesteps("leading", 50, train_steps=1000, steps_offset=20)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'trailing'"):
        space_timesteps("trailling", 10, train_steps=1000)
    with pytest.raises(UnknownName, match="did you mean 'karras'"):
        space_sigmas("karas", 10, sigma_min=0.1, sigma_max=10)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2, 1), (1, 1), (0.1, float("inf")), (float("nan"), 1)])
def test_sigma_ranges_that_are_none_are_refused(low: float, high: float) -> None:
    with pytest.raises(BadInput, match="sigma_min < sigma_max"):
        space_sigmas("karras", 10, sigma_min=low, sigma_max=high)


def test_the_callers_timesteps() -> None:
    assert check_timesteps(np.array([999, 10.5, 0]), train_steps=1000).tolist() == [999, 10.5, 0]
    for wrong, message in (
        ([999, 999], "999 is followed by 999"),
        ([10, 20], "10 is followed by 20"),
        ([1000, 1], "timestep 1000 is outside"),
        ([5, -1], "timestep -1 is outside"),
        ([], "not a list"),
        ([float("nan")], "not a list"),
    ):
        with pytest.raises(BadInput, match=message):
            check_timesteps(np.array(wrong), train_steps=1000)
