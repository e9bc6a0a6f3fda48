"""From PyTorch checkpoints to ONNX and to bundles: recipes, model families, the exporter and ``build``."""

from __future__ import annotations

from tstitch_export.build import build
from tstitch_export.families import FAMILIES, open_family
from tstitch_export.planning.recipe import Recipe, load_recipe, recipe_names

__all__ = ["FAMILIES", "Recipe", "build", "load_recipe", "open_family", "recipe_names"]
