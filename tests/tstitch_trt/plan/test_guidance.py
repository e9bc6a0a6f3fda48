"""What one guidance scale means to members of different kinds, step by step."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from support.manifests import manifest, member
from tstitch_engines.bundle.manifest import Conditioning, Defaults, Manifest
from tstitch_engines.device.step_row import ROW
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.plan.guidance import check_guidance_options
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.plan import make_plan

DISTILLED = msgspec.structs.replace(member(), guidance_embedding=256)
TEXT = Conditioning(kind="text")


def members(kinds: str, guidance: float = 5.0) -> Manifest:
    """``p``: plain, ``d``: distilled for a scale."""
    made = {f"m{place}": DISTILLED if kind == "d" else member() for place, kind in enumerate(kinds)}
    return manifest(made, conditioning=TEXT, defaults=Defaults(guidance=guidance, schedule=",".join(made)))


@pytest.mark.parametrize(
    ("kinds", "asked", "scales", "embedded"),
    [
        # small plain, large distilled, and the reverse
        ("pd", {"guidance": 7.5}, [7.5, 7.5, 1, 1], {"m1": 7.5}),
        ("pd", {"guidance": 1.0}, [1, 1, 1, 1], {"m1": 1.0}),
        ("pd", {"guidance": 0.0}, [0, 0, 1, 1], {"m1": 0.0}),
        ("pd", {"guidance": {"m0": 1.0, "m1": -2.0}}, [1, 1, 1, 1], {"m1": -2.0}),
        ("dp", {"guidance": {"m0": 8.5, "m1": 3.0}}, [1, 1, 3, 3], {"m0": 8.5}),
        # a member without a scale of its own has the bundle's
        ("dp", {"guidance": {"m1": 3.0}}, [1, 1, 3, 3], {"m0": 5.0}),
        ("dp", {"schedule": "m0:2:g=4,m1"}, [1, 1, 5, 5], {"m0": 4.0}),
        ("pd", {"guidance": 3.0, "schedule": "m0:1:g=1,m0:1,m1"}, [1, 3, 1, 1], {"m1": 3.0}),
        ("pd", {"guidance": 3.0, "schedule": "m1"}, [1, 1, 1, 1], {"m1": 3.0}),
        ("pd", {"guidance": 3.0, "schedule": "m0", "guidance_interval": (1, 3)}, [1, 3, 3, 1], {}),
        # three members, two of them distilled for scales of their own
        ("dpd", {"guidance": {"m0": 2, "m2": 9}, "schedule": "m0:1,m1:2,m2:1"}, [1, 5, 5, 1], {"m0": 2, "m2": 9}),
        ("pdp", {"guidance": 6.0, "schedule": "m0:1,m1:2,m2:1"}, [6, 1, 1, 6], {"m1": 6.0}),
    ],
)  # fmt: skip
def test_each_member_takes_the_scale_as_its_kind(
    kinds: str, asked: dict[str, Any], scales: list[float], embedded: dict[str, float]
) -> None:
    schedule = ",".join(f"m{place}:{4 // len(kinds)}" for place in range(len(kinds)))
    plan = make_plan(members(kinds), steps=4, **{"schedule": schedule, **asked})
    assert plan.rows[:, ROW["G"]].tolist() == scales
    assert plan.guided == tuple(scale != 1 for scale in scales)
    assert plan.embedded == embedded


@pytest.mark.parametrize(
    ("kinds", "asked", "why"),
    [
        ("pd", {"guidance": -1.0}, "guidance -1 of member 'm0'; allowed are numbers from 0 on"),
        ("dp", {"guidance": {"m1": -0.5}}, "guidance -0.5 of member 'm1'"),
        ("dp", {"schedule": "m0:1:g=2,m0:1:g=3,m1"}, "'m0' takes its guidance scale as an input.*; got 2, 3"),
        ("pd", {"guidance_interval": (0, 2)}, "the guidance interval leaves 2 of its 2 steps out"),
        ("dp", {"guidance_interval": (1, 4)}, "'m0' takes.*the guidance interval leaves 1 of its 2 steps out"),
        ("pd", {"guidance": {"m2": 1.0}}, "unknown member 'm2'"),
    ],
)
def test_scales_that_a_member_can_not_take(kinds: str, asked: dict[str, Any], why: str) -> None:
    with pytest.raises((BadInput, UnknownName), match=why):
        make_plan(members(kinds), steps=4, **{"schedule": "m0:2,m1:2", **asked})


@pytest.mark.parametrize(
    "asked",
    [{"guidance_rescale": 0.7}, {"guided_channels": 3}, {"guidance_interval": (0, 4)}],
    ids=lambda one: min(one),
)
def test_options_of_a_second_half_that_nobody_runs(asked: dict[str, Any]) -> None:
    """They are refused of a request, and not of a plan: a study's settings serve all its schedules."""
    for kinds, guidance in (("dd", 7.5), ("pp", 1.0)):
        options = PlanOptions(steps=4, schedule="m0:2,m1:2", guidance=guidance, **asked)
        plan = make_plan(members(kinds), options)
        with pytest.raises(BadInput, match=f"{min(asked)} .* has no effect: no step of this plan is guided"):
            check_guidance_options(options, plan.guided)
    options = PlanOptions(steps=4, schedule="m0:2,m1:2", guidance=7.5, **asked)
    check_guidance_options(options, make_plan(members("pp"), options).guided)
