"""Packs trained members and the feature network as the package data of the recipe ``fashion``.

    python -m tstitch_export.pack_pair --small runs/small/ema.safetensors --large runs/large/ema.safetensors \
        --quality runs/classifier --out export/tstitch_export/pairs/fashion

Writes for each member ``NAME.safetensors`` (weights rounded to float16), ``NAME.onnx`` (a graph that computes in
float32 and reads its weights out of that file) and ``NAME.json`` (the record that ``build`` reads); graph and record in
half precision are ``NAME.fp16.onnx``, ``NAME.bf16.json`` and so on. Members that are not named stay as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tstitch_engines.bundle.files import describe_file
from tstitch_engines.bundle.manifest import Member, Precision, Source
from tstitch_engines.errors import BuildFailed, TStitchError
from tstitch_engines.needs import require
from tstitch_engines.progress import silent
from tstitch_export.build import versions_of
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.families import open_family
from tstitch_export.families.base import TORCH_NAMES
from tstitch_export.onnx_export.exporter import GRAPH, check_graph, export_onnx
from tstitch_export.onnx_export.graph import validate
from tstitch_export.onnx_export.pack import refer_to_safetensors
from tstitch_export.planning.recipe import MemberRecipe, load_recipe
from tstitch_export.planning.shipped import ShippedMember, write_shipped

__all__ = ["LIMIT", "main", "pack_member"]

LIMIT = 12_000_000  # bytes that the whole pair may take in the repository
_BUFFERS = ("pos_embed",)  # computed tables, small: kept in float32


def pack_member(name: str, recipe: MemberRecipe, checkpoint: Path, out: Path) -> dict[Precision, ShippedMember]:
    """Packs one member into ``out`` and returns its records. Raises what the export raises."""
    weights = out / f"{name}.safetensors"
    _round_weights(checkpoint, weights)
    return {precision: _pack_graph(name, recipe, weights, precision) for precision in TORCH_NAMES}


def _pack_graph(name: str, recipe: MemberRecipe, weights: Path, precision: Precision) -> ShippedMember:
    family = open_family(recipe.family)
    inspection = family.inspect(weights, recipe.options)
    onnx = require("onnx", "packing a pair")
    graph = weights.with_name(f"{name}.onnx" if precision == "fp32" else f"{name}.{precision}.onnx")
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(family, inspection, precision=precision, folder=Path(folder), progress=silent)
        model = onnx.load(Path(folder) / GRAPH)
    refer_to_safetensors(model, weights)
    graph.write_bytes(model.SerializeToString(deterministic=True))
    inputs, outputs = family.inputs(inspection, precision), family.outputs(inspection, precision)
    validate(graph, inputs=inputs, outputs=outputs)
    stored = describe_file(weights)
    member = Member(
        family=recipe.family,
        parametrisation=recipe.parametrisation,
        precision=precision,
        learned_variance=inspection.learned_variance,
        inputs=inputs,
        outputs=outputs,
        onnx=(describe_file(graph), stored),
        sources=(Source(name=stored.path, sha256=stored.sha256, bytes=stored.bytes, shipped=True),),
        check=check_graph(graph, family, inspection, precision),
        config=dict(inspection.config),
    )
    record = ShippedMember(member=member, versions=versions_of(inspection.libraries))
    write_shipped(graph.with_suffix(".json"), record)
    return record


def _round_weights(checkpoint: Path, target: Path) -> None:
    """Writes the checkpoint as float16, except for the tables; a value beyond float16's range is an error."""
    import torch
    from safetensors.torch import save_file

    rounded = {}
    for name, tensor in read_checkpoint(checkpoint).tensors().items():
        rounded[name] = tensor.float().contiguous() if name in _BUFFERS else tensor.half().contiguous()
        if not torch.isfinite(rounded[name]).all():
            raise BuildFailed(
                f"{checkpoint.name}: {name} holds values that float16 can't, up to {float(tensor.abs().max()):.3g}",
                hint="train with weight decay, or do not pack this model",
            )
    save_file(rounded, target)
    target.chmod(0o644)


def main(argv: list[str] | None = None) -> int:
    recipe, _ = load_recipe("fashion")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in recipe.members:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"trained weights of member {name}")
    parser.add_argument("--quality", type=Path, metavar="DIR", help="folder with classifier.onnx and reference.npz")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for name, member in recipe.members.items():
            checkpoint: Path | None = getattr(args, name)
            if checkpoint is not None:
                for precision, record in pack_member(name, member, checkpoint, args.out).items():
                    check = record.member.check
                    assert check is not None
                    sys.stdout.write(f"{name}: packed in {precision}, equals PyTorch within {check.rel_l2:.1e}\n")
    except TStitchError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    for file in ("classifier.onnx", "reference.npz") if args.quality else ():
        shutil.copyfile(args.quality / file, args.out / file)
    total = sum(path.stat().st_size for path in args.out.iterdir())
    sys.stdout.write(f"{args.out}: {total / 1e6:.2f} MB of at most {LIMIT / 1e6:.0f} MB\n")
    return 0 if total <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
