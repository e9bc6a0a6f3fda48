"""Asks a loaded plan for its layers, and keeps their list beside a plan that was just compiled."""

from __future__ import annotations

import logging
from pathlib import Path

from tstitch_engines.backends.tensorrt.api import CudaEngine, Library
from tstitch_engines.backends.tensorrt.layers import PlanLayers, of_log, parse_inspector, write_layers
from tstitch_engines.backends.tensorrt.library import Session
from tstitch_engines.backends.tensorrt.plan import map_plan

__all__ = ["list_layers", "of_engine"]

_log = logging.getLogger(__name__)


def of_engine(engine: CudaEngine, library: Library, name: str) -> PlanLayers:
    """As a loaded plan tells them. ``name``: of the library. Raises ``ValueError`` where it tells nothing."""
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise ValueError("the engine has no inspector")
    text = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    return PlanLayers(source="engine inspector", library=name, layers=parse_inspector(text))


def list_layers(opened: Session, plan: Path, *, on_gpu: bool, host_code: bool = False) -> bool:
    """Writes the layers of ``plan`` beside it: as the log had them, else as the plan says itself on the GPU.

    ``False``, with a warning, where neither can be read: the plan is as good without.
    """
    try:
        if opened.messages.layers:
            found = of_log(opened.messages.layers, str(opened))
        elif on_gpu:
            runtime = opened.library.Runtime(opened.logger)
            if host_code:
                runtime.engine_host_code_allowed = True
            engine = runtime.deserialize_cuda_engine(map_plan(opened.flavour, plan))
            if engine is None:
                raise ValueError(f"the plan does not load: {opened.messages.reason()}")
            found = of_engine(engine, opened.library, str(opened))
        else:
            raise ValueError("the log of the build has none")
    except ValueError as error:
        _log.warning("the layers of %s are not listed: %s", plan.name, error)
        return False
    write_layers(plan, found)
    return True
