"""Time and peak memory of building full-size UNets: random weights -> ONNX -> engines, without a GPU.

    python benchmarks/build_unets.py                        # every part; goes on where it stopped
    python benchmarks/build_unets.py --parts 'sd15-fp16,bksdm-tiny-*'
    python benchmarks/build_unets.py --list

A part is a published architecture (its configuration alone, the weights are random) in one precision. Each of its
phases runs in a process of its own, so that the peak of memory is its own:

    weights        the model is made at random and saved in float16, as checkpoints are shared
    export         tstitch_export's export_onnx: load, trace, write, check against PyTorch on ONNX Runtime
    onnxruntime    compiled for the CPU
    tensorrt-rtx   compiled for compute capability 8.9, without a GPU

The result is one JSON file, written after every phase; a phase that is in it is not run again (--again).
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from gpubench.script import parser_of, run_script, write_record

from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import Component, Network, Precision
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.families import Inspection, open_family
from tstitch_export.onnx_export.exporter import GRAPH, export_onnx
from tstitch_trt.progress import log
from tstitch_trt.study.machine import describe_machine

RESULT: Final = Path(__file__).parent / "results" / "build-unets.json"
PHASES: Final = ("weights", "export", "onnxruntime", "tensorrt-rtx")
PRECISIONS: Final[tuple[Precision, ...]] = ("fp16", "fp32")
_SD: Final[dict[str, Any]] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}

# Published configurations, as settings of diffusers' UNet2DConditionModel: (family, settings)
MODELS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "sd15": ("unet-sd", _SD),
    "bksdm-tiny": (
        "unet-sd",
        {
            **_SD,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
            "mid_block_type": None,
            "layers_per_block": 1,
        },
    ),
    "ssd1b": (
        "unet-sdxl",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": (1, (2, 2), (4, 4)),
            "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--parts", default="*", help="names or patterns with commas (default all)")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"the JSON file (default {RESULT.name} in results/)")
    parser.add_argument(
        "--scratch", type=Path, default=Path("build/unets"), help="weights and engines, several GB a part"
    )
    parser.add_argument("--again", action="store_true", help="run phases that the result already has")
    parser.add_argument("--keep", action="store_true", help="leave weights, ONNX and engines in --scratch")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--child", nargs=2, metavar=("PART", "PHASE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return run_script(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.child:
        part, phase = args.child
        print(json.dumps(_phase(part, phase, args.scratch)))
        return 0
    names = [f"{model}-{precision}" for model in MODELS for precision in PRECISIONS]
    parts = [name for name in names if any(fnmatch.fnmatch(name, p) for p in args.parts.split(","))]
    if not parts:
        raise unknown_name("part", args.parts, names)
    if args.list:
        print("\n".join(parts))
        return 0
    document: dict[str, Any] = {"parts": {}}
    if args.out.is_file():
        document = json.loads(args.out.read_text())
    failed = 0
    for part in parts:
        done = document["parts"].setdefault(part, {})
        left = [phase for phase in PHASES if args.again or "seconds" not in done.get(phase, {})]
        for phase in PHASES if left else ():
            if phase not in left and _output(part, phase, args.scratch).exists():
                continue  # what a later phase needs is still there
            if phase not in left and phase in ("onnxruntime", "tensorrt-rtx"):
                continue
            log(f"{part}: {phase}")
            done[phase] = _measured(part, phase, args.scratch)
            failed += "error" in done[phase]
            done["measured"] = msgspec.to_builtins(describe_machine())
            document["command"] = shlex.join(["python", "benchmarks/build_unets.py"])
            write_record(args.out, document)
            if "error" in done[phase] and phase in ("weights", "export"):
                break
        if not args.keep:
            _tidy(part, args.scratch)
    return 1 if failed else 0


def _measured(part: str, phase: str, scratch: Path) -> dict[str, Any]:
    """Runs a phase in a child. ``peak_bytes``: the largest of its processes; ``seconds``: wall, imports included."""
    start = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--scratch", str(scratch), "--child", part, phase]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if child.returncode:
        reason = f"killed by signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        log(f"{part}: {phase} failed: {reason}")
        return {"error": reason}
    return {"seconds": round(seconds, 1), **json.loads(child.stdout.splitlines()[-1])}


def _phase(part: str, phase: str, scratch: Path) -> dict[str, Any]:
    model, _, precision = part.rpartition("-")
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "weights": lambda: _weights(model, _output(part, phase, scratch)),
        "export": lambda: _export(model, precision, part, scratch),  # type: ignore[arg-type]
        "onnxruntime": lambda: _compile(model, precision, part, "onnxruntime", scratch),  # type: ignore[arg-type]
        "tensorrt-rtx": lambda: _compile(model, precision, part, "tensorrt-rtx", scratch),  # type: ignore[arg-type]
    }
    if model not in MODELS or phase not in work:
        raise BadInput(f"no phase {phase!r} of {part!r}", hint="use --list")
    start = time.perf_counter()
    found = work[phase]()
    found["work_seconds"] = round(time.perf_counter() - start, 1)
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found["peak_bytes"] = max(own, children) * 1024
    return found


def _weights(model: str, folder: Path) -> dict[str, Any]:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    make: Any = UNet2DConditionModel
    unet = make(**MODELS[model][1])
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    unet.half().save_pretrained(folder, max_shard_size="100GB")
    return {"parameters": parameters, "bytes": sum(file.stat().st_size for file in folder.iterdir())}


def _export(model: str, precision: Precision, part: str, scratch: Path) -> dict[str, Any]:
    inspection, folder = _inspection(model, part, scratch), _output(part, "export", scratch)
    folder.mkdir(parents=True, exist_ok=True)
    starts: list[tuple[str, float]] = []
    check = export_onnx(
        open_family(MODELS[model][0]),
        inspection,
        precision=precision,
        folder=folder,
        progress=lambda phase, share: starts.append((phase, time.perf_counter())),
    )
    spans: dict[str, float] = {}
    for (phase, begin), (_, end) in itertools.pairwise(starts):
        spans[phase] = round(spans.get(phase, 0.0) + end - begin, 1)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"bytes": size, "phases": spans, "check": msgspec.to_builtins(check)}


def _compile(model: str, precision: Precision, part: str, backend: str, scratch: Path) -> dict[str, Any]:
    family, inspection = open_family(MODELS[model][0]), _inspection(model, part, scratch)
    folder = _output(part, "export", scratch)
    parts = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name != GRAPH):
        sha256, size = hash_file(path)
        parts.append(Component(path=path.name, sha256=sha256, bytes=size))
    network = Network(
        family=family.name,
        precision=precision,
        inputs=family.inputs(inspection, precision),
        outputs=family.outputs(inspection, precision),
        onnx=tuple(parts),
        sources=(),
        check=None,
        config=dict(inspection.config),
    )
    side = family.dims(inspection)["H"].native
    sides = Range(side * 3 // 4, side, side)
    profile = ShapeProfile({"B": Range(1, 2, 2), "H": sides, "W": sides, "T": Range(77, 77, 231)})
    output = _output(part, backend, scratch)
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    files = open_backend(backend).compile(
        member=network,
        model=folder / GRAPH,
        profile=profile,
        device="cpu",
        options={"compute-capabilities": "8.9"} if backend == "tensorrt-rtx" else {},
        output=output,
        progress=silent,
    )
    return {
        "compile_seconds": round(time.perf_counter() - start, 1),
        "bytes": sum(file.stat().st_size for file in files),
        "version": open_backend(backend).version(),
        "profile": {name: str(allowed) for name, allowed in profile.dims.items()},
    }


def _inspection(model: str, part: str, scratch: Path) -> Inspection:
    return open_family(MODELS[model][0]).inspect(_output(part, "weights", scratch), {})


def _output(part: str, phase: str, scratch: Path) -> Path:
    """What a phase leaves: the folders ``weights`` and ``export``, an engine's file."""
    return scratch / part / (phase if phase in ("weights", "export") else f"engine-{phase}/model.engine")


def _tidy(part: str, scratch: Path) -> None:
    for phase in PHASES:
        output = _output(part, phase, scratch)
        folder = output if phase in ("weights", "export") else output.parent
        for file in folder.iterdir() if folder.is_dir() else ():
            file.unlink()
        if folder.is_dir():
            folder.rmdir()


if __name__ == "__main__":
    sys.exit(main())
