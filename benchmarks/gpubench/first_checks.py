"""What the parts of the first half hour share: a fallback where a step fails, bundles, and their verification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from gpubench.cases import DitCase
from gpubench.first_steps import FALLBACK
from gpubench.models import build_bundle
from gpubench.record import Context, Entry, NotRun, Part
from tstitch_engines.errors import FailedWork, UnknownName
from tstitch_trt.verify.verify import verify

__all__ = ["COMPILED", "PLAIN", "attempt", "built", "verified"]

PLAIN: Final = ("torch", "onnxruntime")  # the backends that need no compiler of their own
COMPILED: Final = ("tensorrt", "tensorrt-rtx")


def attempt(
    part: Part,
    name: str,
    work: Callable[[Entry], Entry | None],
    fallbacks: Mapping[str, Callable[[Entry], Entry]],
    *,
    reserve: float = 0.0,
) -> None:
    """Tries each of ``fallbacks`` (name -> work) until one works, if ``work`` fails."""
    if part.attempt(name, work, reserve=reserve) is not None or part.entries[name]["status"] != "failed":
        return
    for what, other in fallbacks.items():
        if part.attempt(f"{name}{FALLBACK}{what}", other) is not None:
            return


def built(context: Context, case: DitCase, backend: str, options: dict[str, Any]) -> Path:
    """Raises ``NotRun`` where the backend has not one of the options."""
    try:
        return build_bundle(context, case, backend, options)
    except UnknownName as error:
        raise NotRun(error.message) from None


def verified(bundle: Path, device: str, backend: str, entry: Entry) -> Entry:
    """The worst errors of each engine; raises ``FailedWork`` unless all pass."""
    checks = verify(bundle, device=device, backend=backend).engines
    entry["engines"] = [
        {
            "member": check.member,
            "status": check.status,
            "reason": check.reason,
            "limit": check.limit,
            "errors": {f"{c.against} {c.inputs} {c.batch}": c.error.rel_l2 for c in check.comparisons},
        }
        for check in checks
    ]
    if bad := [f"{check.member}: {check.status} {check.reason or ''}" for check in checks if check.status != "passed"]:
        raise FailedWork("; ".join(bad), hint=f"tstitch-trt verify {bundle.name} --layers")
    return {}
