"""The cost model: what is computed from a calibration made by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from support.manifests import manifest
from support.studies import calibration, overhead, step_cost
from tstitch_engines.errors import BadInput, FailedWork, OutOfProfile
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.request.batching import Splitting
from tstitch_trt.study.budget import predict_ms
from tstitch_trt.study.budget.predict import kinds_of, switches_of
from tstitch_trt.study.calibrate.fit import fit
from tstitch_trt.study.records import Calibration


def costs(**changes: object) -> Calibration:
    """Two members at batches 2 and 6: unguided 1 and 3 ms (small), 10 and 30 ms (large); guided at 2 only, twice it."""
    fields = {
        "steps": tuple(
            step_cost(name, batch, ms * factor, guided=guided)
            for name, ms in (("small", 0.5), ("large", 5.0))
            for guided, batches in ((False, (2, 6)), (True, (2,)))
            for batch in batches
            for factor in (batch * (2 if guided else 1),)
        ),
        "overheads": (overhead(2, 0.25, switch=0.5), overhead(6, 0.75, switch=1.5)),
        "splitting": Splitting(floor=1, limit=6),
    }
    return calibration(**(fields | changes))


def predict(cost: Calibration, batch: int, *, start: int = 0, **settings: object) -> float:
    return predict_ms(cost, make_plan(manifest(), **settings), batch=batch, start=start)  # type: ignore[arg-type]


def test_a_trajectory_is_the_sum_of_its_steps_and_overhead() -> None:
    assert predict(costs(), 2, schedule="small:4,large:6", steps=10) == pytest.approx(4 * 1 + 6 * 10 + 0.25 + 0.5)
    assert predict(costs(), 2, schedule="large", steps=3) == pytest.approx(30.25)
    assert predict(costs(), 6, schedule="large,small,large", steps=3) == pytest.approx(2 * 30 + 3 + 0.75 + 2 * 1.5)


def test_guided_steps_have_their_own_cost_and_a_change_of_guidance_is_a_switch() -> None:
    assert predict(costs(), 2, schedule="large", steps=4, guidance=2.0) == pytest.approx(4 * 20 + 0.25)
    got = predict(costs(), 2, schedule="small:2,large:2", steps=4, guidance=2.0, guidance_interval=(1, 3))
    assert got == pytest.approx((1 + 2) + (20 + 10) + 0.25 + 3 * 0.5)


def test_between_batches_it_is_linear_and_beyond_them_refused() -> None:
    assert predict(costs(), 3, schedule="large", steps=1) == pytest.approx(15 + 0.375)
    with pytest.raises(BadInput, match=r"unguided steps of 'small'|the overhead") as caught:
        predict(costs(), 1, schedule="small", steps=1)
    assert "--batch 1,2,6" in caught.value.hint
    with pytest.raises(BadInput, match=r"3 images at once .* guided steps of 'large' were") as caught:
        predict(costs(), 3, schedule="large", steps=1, guidance=2.0)
    assert "measured at batch 2" in caught.value.message


def test_more_images_run_in_chunks_as_the_runtime_splits_them() -> None:
    assert predict(costs(), 14, schedule="large", steps=1) == pytest.approx(2 * 30.75 + 10.25)
    guided = costs(splitting=Splitting(floor=1, limit=4))  # two guided images fill a call
    assert predict(guided, 6, schedule="large", steps=1, guidance=2.0) == pytest.approx(3 * 20.25)


def test_with_graphs_the_spare_lanes_are_paid_for() -> None:
    padded = costs(splitting=Splitting(floor=1, limit=6, tuned=(6,), rounded=True))
    assert predict(padded, 5, schedule="large", steps=1) == pytest.approx(30.75)
    assert predict(padded, 3, schedule="large", steps=1) == predict(costs(), 4, schedule="large", steps=1)


def test_a_trajectory_entered_later_runs_the_rest() -> None:
    assert predict(costs(), 2, start=4, schedule="small:4,large:6", steps=10) == pytest.approx(60.25)
    with pytest.raises(BadInput, match=r"start 10 is outside 0\.\.9"):
        predict(costs(), 2, start=10, steps=10, guidance=1.0)


def test_another_size_or_a_member_that_was_not_measured_is_refused() -> None:
    plan = make_plan(manifest(), schedule="large", steps=2)
    with pytest.raises(BadInput, match=r"12x16 .*were not calibrated; measured are 8x8"):
        predict_ms(costs(), plan, batch=2, size=(16, 12))
    without = costs(steps=tuple(cost for cost in costs().steps if cost.member == "small"))
    with pytest.raises(BadInput, match=r"2 images .*steps of 'large' were not measured"):
        predict_ms(without, plan, batch=2)
    with pytest.raises(BadInput, match="batch 0"):
        predict_ms(costs(), plan, batch=0)


def test_the_first_size_is_the_one_meant() -> None:
    wide = tuple(step_cost("large", 2, 99.0, size=(8, 16)) for _ in range(1))
    both = costs(steps=(*costs().steps, *wide), overheads=(*costs().overheads, overhead(2, 1.0, size=(8, 16))))
    plan = make_plan(manifest(), schedule="large", steps=1)
    assert predict_ms(both, plan, batch=2) == pytest.approx(10.25)
    assert predict_ms(both, plan, batch=2, size=(8, 16)) == pytest.approx(100)


def test_the_fit_finds_what_made_the_times() -> None:
    rng = np.random.default_rng(0)
    want = {("small", False): 0.9, ("small", True): 1.7, ("large", False): 13.0, ("large", True): 25.0}
    runs = [(kind,) * count for kind in want for count in (2, 20)]
    runs += [tuple(list(want)[i] for i in rng.integers(0, 4, 12)) for _ in range(3)]
    exact = [(run, 0.3 + 0.2 * switches_of(run) + sum(want[kind] for kind in run)) for run in runs]
    found = fit(exact)
    assert found.once == pytest.approx(0.3)
    assert found.switch == pytest.approx(0.2)
    assert found.step == pytest.approx(want)
    noisy = fit([(run, ms * (1 + 0.01 * rng.standard_normal())) for run, ms in exact])
    assert noisy.step == pytest.approx(want, rel=0.05)


def test_overhead_and_switch_are_never_negative() -> None:
    small, large = ("small", False), ("large", False)
    times = {(small,) * 2: 1.8, (small,) * 20: 20.0, (large,) * 2: 19.0, (large,) * 20: 200.0, (small, large) * 5: 52.0}
    found = fit(list(times.items()))
    assert found.once == 0
    assert found.switch == 0
    assert found.step == pytest.approx({small: 1, large: 10}, rel=0.15)


def test_times_that_tell_nothing_are_a_failure() -> None:
    small, large = ("small", False), ("large", False)
    backwards = [((small,) * 2, 30.0), ((small,) * 20, 10.0), ((large,) * 2, 30.0), ((large,) * 20, 10.0)]
    with pytest.raises(FailedWork, match="do not tell the members apart"):
        fit(backwards)


def test_splitting_is_that_of_the_runtime() -> None:
    split = Splitting(floor=2, limit=12, tuned=(8,), rounded=True)
    assert split.chunks(25, guided=False) == [12, 12, 1]
    assert split.chunks(13, guided=True) == [6, 6, 1]
    assert [split.lanes(n, guided=(False,)) for n in (1, 3, 7, 9)] == [2, 4, 8, 12]
    assert [split.lanes(n, guided=(True,)) for n in (1, 3, 5)] == [1, 4, 6]
    assert split.lanes(1, guided=(True, False)) == 2
    assert Splitting(floor=2, limit=12).lanes(7, guided=(False,)) == 7
    with pytest.raises(OutOfProfile, match="largest batch is 1"):
        Splitting(floor=1, limit=1).chunks(1, guided=True)
    with pytest.raises(OutOfProfile, match=r"batch profile 3\.\.4 has no room"):
        Splitting(floor=3, limit=4).lanes(1, guided=(True, False))


def test_switches_count_changes_of_member_and_guidance() -> None:
    plan = make_plan(manifest(), schedule="small:2,large:2,small", steps=6, guidance=3.0, guidance_interval=(1, 6))
    assert switches_of(kinds_of(plan)) == 3
