"""Solvers as tables of coefficients: ``make_table("dpmpp-2m", noise, 20, spacing="trailing")``."""

from tstitch_trt.solvers.make_table import make_table
from tstitch_trt.solvers.options import OPTION_NAMES, SPACING_OPTIONS, SolverOptions
from tstitch_trt.solvers.registry import DEFAULT_SPACING, SOLVERS, resolve, with_default_spacing
from tstitch_trt.solvers.table import StepTable

__all__ = [
    "DEFAULT_SPACING",
    "OPTION_NAMES",
    "SOLVERS",
    "SPACING_OPTIONS",
    "SolverOptions",
    "StepTable",
    "make_table",
    "resolve",
    "with_default_spacing",
]
