"""Every pipeline class of diffusers: taken by ``accelerate``, or not; and the arguments of those that are."""

from __future__ import annotations

import inspect

from support.compatibility.markdown import code, codes, table
from tstitch_trt.pipeline.arguments import HEEDED
from tstitch_trt.pipeline.kinds import KINDS
from tstitch_trt.pipeline.stock import PROCESSORS

__all__ = ["pipeline_section"]


def pipeline_section() -> str:
    import diffusers
    from diffusers import pipelines

    folders = {
        folder: [name for name in names if "Pipeline" in name and not name.endswith("Output")]
        for folder, names in pipelines._import_structure.items()
    }
    every = {name for names in folders.values() for name in names}
    assert KINDS.keys() <= every
    refused = [
        (code(folder), ", ".join(sorted(name.replace("Pipeline", "") for name in others)))
        for folder, names in sorted(folders.items())
        if (others := [name for name in names if name not in KINDS])
    ]
    count = sum(name not in KINDS for names in folders.values() for name in names)
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
            f"Taken, and subclasses that leave the call of these as it is: {codes(sorted(KINDS))}.",
            f"Arguments of their calls that mean what they mean there: {codes(sorted(heeded))}.",
            f"Arguments that may only have their default: {codes(sorted(others))}.",
            f"Attention processors that may be set: {codes(processors)}. Any other, hooks, replaced functions and "
            "classes of other origin are refused by name, since engines would not run them.",
            f"<details><summary>The other {count} pipeline classes are refused as unknown</summary>",
            'By folder of diffusers; "Pipeline" is left out of the names.',
            table(("folder", "classes"), refused),
            "</details>",
        ]
    )
