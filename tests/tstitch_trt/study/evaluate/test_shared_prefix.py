"""Settings drawn together are bit for bit those drawn alone, and what they have in common runs once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.evaluate.shared_prefix import draw_settings
from tstitch_trt.study.records import Setting
from tstitch_trt.study.settings import (
    ORDERS,
    fraction_settings,
    options_of,
    plan_of,
    reference_of,
    setting_of,
    share_in_order,
)

REQUEST: dict[str, Any] = {"labels": [i % 10 for i in range(11)], "seeds": list(range(100, 111))}  # over a batch of 8
MORE = ("large:2,small:4,large", "small:0.5:g=1,large:g=3", "small:2,large:2,small:2,large")


@pytest.fixture(scope="module")
def runtime(tiny_pair: TinyPair) -> Iterator[Runtime]:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as runtime:
        yield runtime


def some_settings(runtime: Runtime, solver: str, guidance: float, **more: Any) -> list[Setting]:
    wanted: dict[str, Any] = {"steps": 8, "solver": solver, "guidance": guidance}
    found = fraction_settings(runtime.manifest, (0.0, 0.25, 0.5, 1.0), ORDERS, **wanted)
    found += [setting_of(runtime.manifest, schedule=text, **wanted, more=more) for text in MORE]
    return list({repr(setting): setting for setting in found}.values())


@pytest.mark.parametrize(
    ("solver", "guidance"),
    [("ddim", 1.0), ("ddim", 2.0), ("ddpm", 2.0), ("dpmpp-2m", 2.0), ("pndm", 1.0), ("unipc", 1.0)],
)
def test_shared_drawing_is_bit_for_bit_a_direct_run(runtime: Runtime, solver: str, guidance: float) -> None:
    settings = some_settings(runtime, solver, guidance)
    drawn = list(draw_settings(runtime, settings, REQUEST))
    assert drawn[0][0] == settings[0]
    assert sorted(s.schedule for s, _ in drawn) == sorted(s.schedule for s in settings)
    for setting, latents in drawn:
        direct = runtime.sample(decode=False, **REQUEST, **options_of(setting).explicit())
        np.testing.assert_array_equal(latents, direct.latents, err_msg=setting.schedule)


def test_a_history_that_starts_again_at_a_switch_is_shared_too(runtime: Runtime) -> None:
    wanted: dict[str, Any] = {"steps": 6, "solver": "dpmpp-2m", "guidance": 1.0, "more": {"history": "reset"}}
    settings = [setting_of(runtime.manifest, schedule=text, **wanted) for text in ("small:3,large:3", "small:6")]
    for setting, latents in draw_settings(runtime, settings, REQUEST):
        direct = runtime.sample(decode=False, **REQUEST, **options_of(setting).explicit())
        np.testing.assert_array_equal(latents, direct.latents, err_msg=setting.schedule)


class Counting:
    """A runtime that notes how many rows it runs."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.manifest = runtime.manifest
        self.rows = 0

    def sample(self, **keywords: Any) -> Any:
        result = self._runtime.sample(**keywords)
        self.rows += result.plan.steps - keywords.get("start_step", 0)
        return result


@pytest.mark.parametrize(("solver", "rows"), [("ddim", 8 + 4 + 8 + 4 + 2), ("dpmpp-2m", 5 * 8)])
def test_what_settings_have_in_common_is_run_once(runtime: Runtime, solver: str, rows: int) -> None:
    """Two whole walks, and three that leave them or one another after 4, 4 and 6 rows; with a history all are whole."""
    texts = ("large:8", "large:4,small:4", "small:8", "small:4,large:4", "small:4,large:2,small:2")
    settings = [setting_of(runtime.manifest, schedule=text, steps=8, solver=solver, guidance=1.0) for text in texts]
    counting: Any = Counting(runtime)
    list(draw_settings(counting, settings, REQUEST))
    assert counting.rows == rows


def test_settings_are_resolved_and_canonical(runtime: Runtime) -> None:
    manifest = runtime.manifest
    setting = setting_of(manifest, schedule="small:40%,large", steps=10)
    assert setting.schedule == "small:4,large:6"
    assert setting.members == {"small": 4, "large": 6}
    assert (setting.solver, setting.guidance, setting.rows) == ("ddim", manifest.defaults.guidance, 10)
    same = setting_of(manifest, schedule=",".join(["small"] * 4 + ["large"] * 6), steps=10)
    assert same == setting
    assert reference_of(manifest, [setting]).schedule == "large:10"
    assert list(plan_of(manifest, setting).schedule.names) == ["small"] * 4 + ["large"] * 6
    pndm = setting_of(manifest, schedule="small:0.5,large", steps=10, solver="pndm")
    assert pndm.rows == 11
    guided = setting_of(manifest, schedule="small:2:g=1,large:g=2.5", steps=4, guidance=3.0)
    assert guided.schedule == "small:2:g=1,large:2:g=2.5"
    assert setting_of(manifest, schedule=guided.schedule, steps=4, guidance=3.0) == guided


def test_fractions_round_as_the_paper_does_in_both_orders(runtime: Runtime) -> None:
    found = fraction_settings(runtime.manifest, (0.0, 0.3, 1.0), ORDERS, steps=8)
    assert [s.schedule for s in found] == [
        "large:8", "small:2,large:6", "small:8", "large:8", "large:6,small:2", "small:8",
    ]  # fmt: skip
    shares = [share_in_order(s, ["small", "large"], "small-first") for s in found]
    assert shares == [0, 0.25, 1, 0, None, 1]
    assert (
        share_in_order(setting_of(runtime.manifest, schedule=MORE[0], steps=8), ["small", "large"], "large-first")
        is None
    )


def test_orders_and_members_are_checked(runtime: Runtime, tiny_pair: TinyPair) -> None:
    with pytest.raises(UnknownName, match="small-frist"):
        fraction_settings(runtime.manifest, (0.5,), ["small-frist"], steps=8)
    with pytest.raises(BadInput, match="two members"):
        fraction_settings(open_bundle(tiny_pair.alone("large")).manifest, (0.5,), ORDERS, steps=8)
