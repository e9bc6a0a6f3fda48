"""Every pipeline class of diffusers: taken by ``accelerate``, or not; and the arguments of those that are."""

from __future__ import annotations

import inspect

from support.compatibility.markdown import codes
from tstitch_trt.pipeline.arguments import HEEDED
from tstitch_trt.pipeline.kinds import KINDS
from tstitch_trt.pipeline.stock import PROCESSORS

__all__ = ["pipeline_section"]


def pipeline_section() -> str:
    import diffusers

    every = {name for name in dir(diffusers) if name.endswith("Pipeline")}
    assert KINDS.keys() <= every
    refused = sorted(name.removesuffix("Pipeline") for name in every - KINDS.keys())
    rows: dict[str, list[str]] = {}
    for name in KINDS:
        for key in inspect.signature(getattr(diffusers, name).__call__).parameters:
            if key not in ("self", "kwargs"):
                rows.setdefault(key, []).append(name)
    heeded = [key for key in rows if key in HEEDED]
    others = [key for key in rows if key not in HEEDED]
    processors = [name for names in PROCESSORS.values() for name in sorted(names)]
    return "\n\n".join(
        [
            "## Pipelines of diffusers in `accelerate`",
            "These pipelines are accelerated, and so are their subclasses that do not change `__call__`: "
            f"{codes(sorted(KINDS))}.",
            f"These arguments of a call mean what they mean in diffusers: {codes(sorted(heeded))}.",
            f"These arguments must keep their default: {codes(sorted(others))}.",
            f"These attention processors may be set: {codes(processors)}. Other processors, hooks, replaced functions "
            "and classes from elsewhere are refused by name, because an engine would not run them.",
            f"<details><summary>The other {len(refused)} pipeline classes are refused as unknown</summary>",
            'Their names, without "Pipeline" at the end: ' + ", ".join(refused) + ".",
            "</details>",
        ]
    )
