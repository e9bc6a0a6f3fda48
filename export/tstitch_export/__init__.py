"""PyTorch -> ONNX -> bundles: model families, recipes and the build. torch and onnx load only where they are needed."""

from __future__ import annotations

from tstitch_export.build import build
from tstitch_export.families import FAMILIES, Family, Inspection, open_family
from tstitch_export.recipe import MemberRecipe, Recipe, load_recipe, recipe_names

__all__ = [
    "FAMILIES",
    "Family",
    "Inspection",
    "MemberRecipe",
    "Recipe",
    "build",
    "load_recipe",
    "open_family",
    "recipe_names",
]
