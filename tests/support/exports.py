"""Exports of single networks as a build makes them: through the cache that all tests of a run share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tstitch_engines.bundle.cache import Cache
from tstitch_engines.bundle.manifest import Network, Precision
from tstitch_engines.progress import silent
from tstitch_export.families.base import Scalar
from tstitch_export.hub.checkpoints import Checkpoints
from tstitch_export.onnx_export.network import exported_network, exported_program
from tstitch_export.planning.network import NetworkPlan, plan_part
from tstitch_export.planning.recipe import PartRecipe

__all__ = ["graph_of", "network_plan", "onnx_of", "program_of"]


def network_plan(
    family: str, path: Path, options: Mapping[str, Scalar] | None = None, precision: Precision = "fp32"
) -> NetworkPlan:
    return plan_part("network", PartRecipe(family=family), path, options or {}, precision, path.name, Checkpoints())


def onnx_of(plan: NetworkPlan, folder: Path) -> Network:
    """Written below ``folder``; the check and the files are in the record."""
    return exported_network(plan, folder, cache=Cache(), report=silent)[0]


def graph_of(network: Network, folder: Path) -> Path:
    """The ONNX file of what ``onnx_of`` wrote."""
    return folder / network.onnx[0].path


def program_of(plan: NetworkPlan) -> Path:
    """The ``torch.export`` archive."""
    return exported_program(plan, cache=Cache(), report=silent)
