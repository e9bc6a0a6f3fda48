"""TensorRT-RTX on this GPU: attempts from the official way to the hopeful ones, every message kept.

No version lists compute capability 9.0. 1.7.1 has a check that refuses GPUs it does not know; earlier versions do not,
and all of them carry code for 9.0. Each attempt is a process of its own (a library may end it), with the version's
unpacked wheels in front of the path: ``--rtx-site 1.6.1=DIR``. Without such a folder only the installed version is
tried.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpubench.cases import MODELS
from gpubench.models import random_dit
from gpubench.record import Context, Entry, NotRun, Part
from tstitch_engines.progress import silent

__all__ = ["ATTEMPTS", "Attempt", "rtx_part"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """``capabilities``: empty for the library's own list, ``current`` for this GPU. ``static``: one batch size."""

    version: str
    model: str = "fp16 opset 20"
    capabilities: str = ""
    strategy: str = "EAGER"
    static: bool = False
    refit: bool = False

    @property
    def name(self) -> str:
        parts = [self.version, self.model, self.capabilities or "default list", self.strategy]
        return ", ".join([*parts, *(["static"] if self.static else []), *(["refit"] if self.refit else [])])


def _ladder(version: str) -> tuple[Attempt, ...]:
    return (
        Attempt(version=version),
        Attempt(version=version, capabilities="SM80"),
        Attempt(version=version, strategy="NONE"),
        Attempt(version=version, static=True),
        Attempt(version=version, model="conv"),
        Attempt(version=version, model="fp16 opset 23"),
    )


ATTEMPTS: Final = (
    Attempt(version="1.7.1"),
    *_ladder("1.6.1"),
    *_ladder("1.5.0"),
    *_ladder("1.4.0"),
    Attempt(version="1.6.1", capabilities="CURRENT"),
    Attempt(version="1.6.1", capabilities="CURRENT", refit=True),
)


def rtx_part(context: Context, part: Part) -> None:
    """Compiling needs no GPU and is done for real everywhere; what follows gives its message without one."""
    if not context.rtx_sites and not any(map(importlib.util.find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings"))):
        raise NotRun("TensorRT-RTX is not installed, and no --rtx-site was given")
    models = _models(context.scratch / "rtx")
    attempts = ATTEMPTS[:1] if context.smoke else ATTEMPTS
    for attempt in attempts:

        def work(entry: Entry, attempt: Attempt = attempt) -> Entry:
            return _try(context, attempt, models[attempt.model])

        part.attempt(attempt.name, work, reserve=30)
    if not context.cuda:
        raise NotRun("no CUDA device (plans were compiled as far as the library is installed)")


def _try(context: Context, attempt: Attempt, model: Path) -> Entry:
    site = next((p for v, p in context.rtx_sites.items() if v.startswith(attempt.version)), None)
    env = dict(os.environ)
    if site is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [env.get("PYTHONPATH")])])
    script = Path(__file__).with_name("rtx_attempt.py")
    said = asdict(attempt) | {"model": str(model), "needs": attempt.version, "cuda": context.cuda}
    timeout = max(min(120.0, context.seconds_left() - 5), 5.0)
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                [sys.executable, str(script), json.dumps(said)],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=env, timeout=timeout, check=False,
            )  # fmt: skip
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            output, code = (error.stdout or b"").decode(), -1
        errors.seek(0)
        tail = errors.read()[-2000:]
    steps: list[Any] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if missing := next((step["missing"] for step in steps if "missing" in step), None):
        raise NotRun(missing)
    return {
        "attempt": said,
        "exit_code": code,
        "steps": steps,
        "stderr": tail,
        "runs": any(s.get("equal") for s in steps),
    }


def _models(folder: Path) -> dict[str, Path]:
    """A small DiT in fp16 with attention spelt out and as one node, and a convolution; a case beside each."""
    from safetensors.torch import save_file

    from tstitch_export.families import open_family
    from tstitch_export.onnx_export import exporter

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "dit.safetensors"
    if not checkpoint.is_file():
        save_file(random_dit("tiny+", 64).state_dict(), checkpoint)
    family = open_family("dit")
    inspection = family.inspect(checkpoint, {"num_heads": MODELS["tiny+"][2]})
    found = {}
    for opset in (20, 23):
        target = folder / f"opset-{opset}"
        found[f"fp16 opset {opset}"] = target / exporter.GRAPH
        if (target / "done").is_file():
            continue
        target.mkdir(exist_ok=True)
        exporter.export_onnx(family, inspection, precision="fp16", opset=opset, folder=target, progress=silent)
        sample, timestep, labels = family.example(inspection, batch=2, seed=0)
        feeds = {"sample": sample.half().numpy(), "timestep": timestep.numpy(), "labels": labels.numpy()}
        _answer(target, feeds)
    found["conv"] = _conv(folder / "conv")
    return found


def _answer(folder: Path, feeds: dict[str, Any]) -> None:
    """ONNX Runtime's result on the CPU, beside the graph."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, feeds)
    np.savez(folder / "case.npz", **feeds, want_model_output=want)
    (folder / "done").write_text("")


def _conv(folder: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    path = folder / "model.onnx"
    if (folder / "done").is_file():
        return path
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    weight = (generator.standard_normal((8, 4, 3, 3)) / 6).astype(np.float16)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["sample", "w"], ["y"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["y"], ["model_output"]),
        ],
        "conv",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT16, ["B", 4, 8, 8])],
        [helper.make_tensor_value_info("model_output", TensorProto.FLOAT16, ["B", 8, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    _answer(folder, {"sample": generator.standard_normal((2, 4, 8, 8)).astype(np.float16)})
    return path
