"""The first half hour on a GPU as data: what each step proves, how long it may take, and what is expected to fail."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["FALLBACK", "STEPS", "FirstStep", "first_steps"]


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """``part``: of ``gpu.py``, with these ``contenders`` alone if there are any. ``minutes``: at most, of one run.

    ``expected``: the failure that is likely, ``signs`` (a regular expression) by what its reason is known, and
    ``fallback`` what to do then; what can be tried by itself is tried by the part. ``background``: it runs beside the
    next ones, up to the first that is ``timed``.
    """

    name: str
    part: str
    minutes: float
    proves: str
    contenders: tuple[str, ...] = ()
    expected: str = ""
    signs: str = ""
    fallback: str = ""
    background: bool = False
    timed: bool = False

    def is_expected(self, reason: str) -> bool:
        return bool(self.signs) and re.search(self.signs, reason, re.IGNORECASE) is not None


FALLBACK: Final = "; fallback: "  # in the name of an entry, before what is tried
_SLOW: Final = "the same command goes on where it stopped"
_DIFFERS: Final[dict[str, Any]] = {
    "expected": "tolerance exceeded: its latents differ from PyTorch's in float32",
    "signs": "differ",
    "fallback": "suspect fused attention: tstitch-trt verify BUNDLE --layers, then --option attention=apart",
}

STEPS: Final = (
    FirstStep(
        name="machine",
        part="machine",
        minutes=1,
        proves="driver, GPU and packages are there",
        expected="packages for a newer CUDA than the driver runs: cudaError 35",
        signs=r"\b35\b|driver",
        fallback="packages for CUDA 12, or a newer driver: docs/how-to/gpu.md",
    ),
    FirstStep(
        name="prepare",
        part="prepare",
        minutes=6,
        proves="bundles of the later steps, built on the CPU beside the others",
        background=True,
    ),
    FirstStep(
        name="device",
        part="device-tests",
        minutes=2,
        proves="the step kernels and the CUDA device, against the host's",
        expected="no kernel image",
        signs="kernel image|fatbin",
        fallback="python -m tstitch_engines.make_fatbin",
    ),
    FirstStep(
        name="fashion",
        part="fashion",
        minutes=3,
        proves="the built-in pair on ONNX Runtime and PyTorch: verified, sampled, its steps recorded",
        expected="copies between host and device; not permitted when the stream is capturing",
        signs="captur|copies|no graph|pageable",
        fallback="static batch; graph off",
    ),
    FirstStep(
        name="half",
        part="half",
        minutes=2,
        proves="DiTs in float16 and bfloat16, against float32",
        expected="no implementation for Attention(23), bfloat16 Gelu",
        signs="Attention|Gelu|implement",
        fallback="opset 20",
    ),
    FirstStep(
        name="rtx",
        part="rtx",
        minutes=2,
        proves="TensorRT-RTX on this GPU, by version",
        expected="compute capability 9.0 not supported",
        signs="capabilit|support|SM ?90",
        fallback="a plan for compute capability 8.0, then marked untested",
    ),
    FirstStep(
        name="block",
        part="block",
        minutes=3,
        proves="a bfloat16 block of XL/2 on TensorRT and TensorRT-RTX: attention fused, apart, of opset 22",
        expected="no dedicated kernel for the attention",
        signs="dedicated|fused|no implementation|tactic",
        fallback="attention apart; limits are 1e-1 in bfloat16 and 3e-2 in float16",
    ),
    FirstStep(
        name="capture",
        part="capture",
        minutes=3,
        proves="warm-up, capture, and replay on other data, bit for bit",
        expected="error 901; a graph without nodes",
        signs=r"90[0-9]|captur|empty|no nodes",
        fallback="two warm-ups (Engine.warmups); static shapes; graph off",
    ),
    FirstStep(
        name="ceilings", timed=True, part="ceilings", minutes=1, proves="matrix products and copies at their best"
    ),
    FirstStep(
        name="xl-bf16",
        timed=True,
        part="dit-s-xl-256-b8-bf16",
        contenders=("torch-eager", "ours:torch", "ours:onnxruntime", "ours:tensorrt", "ours:tensorrt-rtx"),
        minutes=6,
        proves="DiT-S and XL/2, batch 8, bfloat16: ours and PyTorch eager draw the same, and how fast",
        **_DIFFERS,
    ),
    FirstStep(
        name="streams",
        timed=True,
        part="streams",
        minutes=4,
        proves="TensorRT's auxiliary streams 0 and 2, static and dynamic batch, against the measured product",
        expected="less than 40 % of the measured product",
        signs="of the measured product",
        fallback="the layer list, the hottest layers first: tstitch-trt inspect BUNDLE --layers",
    ),
    FirstStep(
        name="launches",
        timed=True,
        part="launches",
        minutes=3,
        proves="recorded steps against single launches: equal, the time of both, the overhead",
        expected="no graph",
        signs="captur|graph",
        fallback="graph off",
    ),
    FirstStep(name="soak", part="soak", minutes=5, proves="1,000 trajectories leave no memory behind", fallback=_SLOW),
    FirstStep(name="sanitizer", part="sanitizer", minutes=4, proves="compute-sanitizer finds nothing in the kernels"),
    FirstStep(name="tests", part="tests", minutes=6, proves="all tests marked gpu", fallback=_SLOW),
    FirstStep(
        name="xl-fp16",
        timed=True,
        part="dit-s-xl-256-b8-fp16",
        contenders=("torch-eager", "ours:torch", "diffusers"),
        minutes=6,
        proves="the same in float16, and diffusers",
        **_DIFFERS,
    ),
    FirstStep(
        name="xl-compiled",
        timed=True,
        part="dit-s-xl-256-b8-fp16",
        contenders=("torch-compile", "ours:torch+compile"),
        minutes=8,
        proves="TorchInductor with and without us: 2 to 4 minutes of compiling each",
        **_DIFFERS,
    ),
    FirstStep(
        name="xl-one",
        timed=True,
        part="dit-s-xl-256-b1-fp16",
        contenders=("torch-eager", "ours:torch", "diffusers", "ours:onnxruntime"),
        minutes=4,
        proves="one picture at a time",
        **_DIFFERS,
    ),
    FirstStep(
        name="segments", timed=True, part="segments", minutes=4, proves="one launch for a segment", fallback=_SLOW
    ),
    FirstStep(name="kernels", timed=True, part="kernels", minutes=2, proves="the step kernels' bytes per second"),
)


def first_steps(*, smoke: bool) -> tuple[FirstStep, ...]:
    """With ``smoke`` on the parts with tiny models."""
    if not smoke:
        return STEPS
    tiny = {"xl-bf16": "dit-tiny-tiny+-64-b2-fp32", "xl-one": "dit-tiny-tiny+-64-b1-fp32"}
    kept = [step for step in STEPS if not step.name.startswith("xl-") or step.name in tiny]
    return tuple(FirstStep(**{**step.__dict__, "part": tiny.get(step.name, step.part)}) for step in kept)
