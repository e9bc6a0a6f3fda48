"""Choosing a schedule for a latency budget, as a verb of a runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Unpack

from tstitch_engines.errors import BadInput
from tstitch_trt.request.init_image import check_start_wishes, start_step
from tstitch_trt.request.options import Wishes, split_wishes
from tstitch_trt.request.request import extent

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Manifest
    from tstitch_trt.request.limits import Limits
    from tstitch_trt.study.budget.cost_model import Costs
    from tstitch_trt.study.budget.record import Budget

__all__ = ["Budgeting"]


class Budgeting(ABC):
    """The verb of a runtime that chooses by cost and quality."""

    _costs: Costs | None = None

    @property
    @abstractmethod
    def manifest(self) -> Manifest:
        """See ``Runtime``."""

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """See ``Runtime``."""

    def within_budget(self, latency_budget_ms: float, **wishes: Unpack[Wishes]) -> Budget:
        """The best schedule for a request that takes at most ``latency_budget_ms``; ``sample`` takes it as well.

        ``wishes``: the request as ``sample`` gets it, without ``schedule`` and ``fraction``; what it fixes besides
        (steps, solver, guidance...) stays so, and the rest is chosen. The budget is for ``Result.total_ms``, the
        trajectories of all its images: reading prompts and making pictures of latents is no part of it.

        Cost comes from this machine's calibration (``tstitch-trt calibrate``), quality from the newest search,
        evaluation or profile of the bundle that covers the request, else T-Stitch's rule decides
        (``tstitch_trt.study.budget.candidates``). Raises ``NotCalibrated``, and ``BadInput`` for a budget that nothing
        meets, naming the nearest one that is met.
        """
        from tstitch_trt.study.budget.cost_model import Costs
        from tstitch_trt.study.budget.record import check_budget

        check_budget(latency_budget_ms)
        pictures, settings = split_wishes(wishes)
        for name in ("schedule", "fraction"):
            if settings.get(name) is not None:
                raise BadInput(
                    f"{name} {settings[name]!r} is given beside a budget of {latency_budget_ms:g} ms, which chooses it",
                    hint=f"leave out one of the two: --{name} or --budget-ms ({name}= or latency_budget_ms=)",
                )
        if pictures.get("control") is not None:
            raise BadInput(
                "a budget is given beside a control picture, and what the ControlNet costs is not calibrated",
                hint="leave out one of the two: --control or --budget-ms (control= or latency_budget_ms=)",
            )
        check_start_wishes(pictures)
        settings = {name: value for name, value in settings.items() if value is not None}
        entered: int = pictures.get("start_step", 0)
        if entered and settings.get("timesteps") is None:
            settings.setdefault("steps", self.manifest.defaults.steps)  # the state given is that of one number of steps

        def start(steps: int) -> int:
            return entered if pictures.get("image") is None else start_step(pictures, steps)

        images, size = extent(self.manifest, self.limits, pictures)
        self._costs = Costs.of(self, self._costs)  # type: ignore[arg-type]  # it is a Runtime
        return self._costs.choose(latency_budget_ms, images=images, size=size, settings=settings, start=start)


def chosen_settings(settings: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """The keywords of ``make_plan`` of a request for which ``budget`` was chosen."""
    kept = {name: value for name, value in settings.items() if name not in ("schedule", "fraction")}
    return {**kept, **budget.settings}
