"""UNets of Stable Diffusion and SDXL: exported graphs equal diffusers' modules at sizes they were not traced with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from support.exports import graph_of, network_plan, onnx_of
from support.tiny_families import controlnet_folder, unet_folder
from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.manifest import Network, Precision, TextInputs
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.families import Family, Inspection
from tstitch_trt.reference.recorder import own_files


def ignore(phase: str, share: float) -> None:
    return


@dataclass
class Exported:
    """A tiny model, what its family says of it, and its graph."""

    module: Any
    family: Family
    inspection: Inspection
    graph: Path

    def run(self, sizes: dict[str, int], seed: int) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray[Any, Any]]]:
        """Random inputs by name, and what ONNX Runtime gives."""
        batch = sizes.pop("B")
        inputs = self.family.example(self.inspection, batch=batch, seed=seed, sizes=sizes)
        named = {s.name: x for s, x in zip(self.family.inputs(self.inspection, "fp32"), inputs, strict=True)}
        session = onnxruntime.InferenceSession(str(self.graph), providers=["CPUExecutionProvider"])
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        feeds = {x.name: named[x.name].numpy().astype(kinds[x.type]) for x in session.get_inputs()}
        outputs = [x.name for x in session.get_outputs()]
        return named, dict(zip(outputs, session.run(outputs, feeds), strict=True))


def exported(
    folder: Path, family: str, module: Any, options: dict[str, Any] | None = None, precision: Precision = "fp32"
) -> Exported:
    plan = network_plan(family, folder, options, precision)
    network = onnx_of(plan, folder / "out")
    return Exported(module, plan.family, plan.inspection, graph_of(network, folder / "out"))


def compiled_by_rtx(found: Exported, folder: Path, precision: Precision = "fp32") -> Path:
    """A plan for every size from the native to the next but one; an engine for one size alone is an error."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    network = Network(
        family=found.family.name,
        precision=precision,
        inputs=found.family.inputs(found.inspection, precision),
        outputs=found.family.outputs(found.inspection, precision),
        onnx=own_files(found.graph),
        sources=(),
        check=None,
        config={},
    )
    dims = {name: Range(dim.native, dim.native, dim.native + 2 * dim.multiple)
            for name, dim in found.family.dims(found.inspection).items()}  # fmt: skip
    (plan,) = open_backend("tensorrt-rtx").compile(
        member=network,
        model=found.graph,
        profile=ShapeProfile({"B": Range(1, 2, 4), **dims}),
        device="cpu",
        options={"compute-capabilities": "8.9"},
        output=folder / "plan.rtx",
        progress=ignore,
    )
    return plan


def close(got: np.ndarray[Any, Any], want: torch.Tensor, limit: float) -> None:
    assert got.shape == tuple(want.shape)
    assert np.abs(got.astype(np.float64) - want.double().numpy()).max() <= limit * float(want.abs().max())


# Neither batch, side nor number of tokens is one that was traced; from batches of 64 on diffusers takes another way.
SIZES = ({"B": 1, "H": 6, "W": 10, "T": 77}, {"B": 5, "H": 14, "W": 4, "T": 9}, {"B": 65, "H": 2, "W": 2, "T": 1})


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Everything Stable Diffusion's UNets may have at once: 9 channels, a guidance embedding, residuals.

    Attention on the way up is in ``test_sdxl``.
    """
    folder = tmp_path_factory.mktemp("inpainting")
    up = ("UpBlock2D", "UpBlock2D")
    module = unet_folder(folder, "sd", in_channels=9, time_cond_proj_dim=16, up_block_types=up)
    return exported(folder, "unet-sd", module, {"controlled": True})


def test_stable_diffusion_with_everything(inpainting: Exported) -> None:
    names = [spec.name for spec in inpainting.family.inputs(inpainting.inspection, "fp32")]
    down = [f"down_residual_{index}" for index in range(4)]
    assert names == ["sample", "timestep", "encoder_hidden_states", "timestep_cond", "inpaint", *down, "mid_residual"]
    for seed, sizes in enumerate(SIZES):
        given, got = inpainting.run(dict(sizes), seed)
        assert set(given["inpaint"][:, 0].unique().tolist()) <= {0.0, 1.0}, "a mask"
        with torch.no_grad():
            want = inpainting.module(
                torch.cat([given["sample"], given["inpaint"]], 1),
                given["timestep"],
                given["encoder_hidden_states"],
                timestep_cond=given["timestep_cond"],
                down_block_additional_residuals=[given[name] for name in down],
                mid_block_additional_residual=given["mid_residual"],
            ).sample
        close(got["model_output"], want, 1e-4)


def test_its_facts(inpainting: Exported) -> None:
    found = inpainting.inspection
    assert (found.latent, found.guidance_embedding, found.inpaints, found.controlled) == ((4, 8, 8), 16, True, True)
    assert found.text == TextInputs(hidden=("text_encoder",), width=32)
    assert found.config["residuals"] == "32 32 32/2 64/2 64/2"
    assert "diffusers" in found.libraries
    dims = inpainting.family.dims(found)
    assert {name: (dim.native, dim.multiple) for name, dim in dims.items()} == {"H": (8, 2), "W": (8, 2), "T": (77, 1)}
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*onnx.load(inpainting.graph).graph.input, *onnx.load(inpainting.graph).graph.output)
    }
    assert shapes["sample"] == shapes["model_output"] == ["B", 4, "H", "W"]
    assert shapes["mid_residual"] == ["B", 64, "H/2", "W/2"]
    assert shapes["encoder_hidden_states"] == ["B", "T", 32]


def test_tensorrt_rtx_takes_it_in_float32_at_any_size(inpainting: Exported, tmp_path: Path) -> None:
    """Half precision is in ``backends/tensorrt/test_families.py``: one level, two with the slow tests."""
    assert compiled_by_rtx(inpainting, tmp_path).stat().st_size > 2_000_000


@pytest.mark.parametrize(("kind", "seed", "precision"), [("least", 5, "fp32"), ("one", 3, "fp16")])
def test_pruned_without_middle_block_and_in_half_precision(
    kind: str, seed: int, precision: Precision, tmp_path: Path
) -> None:
    """Pruned as BK-SDM; in half precision the timestep embedding is computed in float32 all the same."""
    module = unet_folder(tmp_path, kind, seed=seed)
    found = exported(tmp_path, "unet-sd", module, precision=precision)
    given, got = found.run(dict(SIZES[1]), 7)
    with torch.no_grad():
        want = module(given["sample"], given["timestep"], given["encoder_hidden_states"]).sample
    close(got["model_output"], want, 1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("kind", ["ssd1b", pytest.param("refiner", marks=pytest.mark.slow)])
def test_sdxl(kind: str, tmp_path: Path) -> None:
    """SSD-1B's middle has no attention and its two ways differ in depth; the refiner takes five numbers."""
    module = unet_folder(tmp_path, kind, seed=len(kind))
    found = exported(tmp_path, "unet-sdxl", module)
    assert found.inspection.text == (
        TextInputs(hidden=("text_encoder_2",), width=32, pooled="text_encoder_2", pooled_width=32, time_ids="aesthetic")
        if kind == "refiner"
        else TextInputs(
            hidden=("text_encoder", "text_encoder_2"),
            width=64,
            pooled="text_encoder_2",
            pooled_width=16,
            time_ids="sizes",
            zero_null=True,
        )
    )
    for seed, sizes in enumerate(SIZES):
        given, got = found.run(dict(sizes), seed)
        assert given["time_ids"].shape[1] == (5 if kind == "refiner" else 6)
        with torch.no_grad():
            want = module(
                given["sample"],
                given["timestep"],
                given["encoder_hidden_states"],
                added_cond_kwargs={"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]},
            ).sample
        close(got["model_output"], want, 1e-4)


def test_controlnet(tmp_path: Path) -> None:
    """Its residuals times the scale of each picture, under the names a member takes them by."""
    module = controlnet_folder(tmp_path, "sdxl", controlnet_conditioning_channel_order="bgr")
    found = exported(tmp_path, "controlnet", module)
    given, got = found.run({"B": 3, "H": 6, "W": 10, "T": 12}, 1)
    assert tuple(given["control"].shape) == (3, 3, 48, 80)
    for index in range(3):  # one at a time: diffusers takes one scale
        one = {name: tensor[index : index + 1] for name, tensor in given.items()}
        with torch.no_grad():
            down, middle = module(
                one["sample"],
                one["timestep"],
                one["encoder_hidden_states"],
                one["control"],
                conditioning_scale=float(one["control_scale"]),
                added_cond_kwargs={"text_embeds": one["text_embeds"], "time_ids": one["time_ids"]},
                return_dict=False,
            )
        want = {**{f"down_residual_{n}": tensor for n, tensor in enumerate(down)}, "mid_residual": middle}
        assert list(got) == list(want)
        for name, tensor in want.items():
            close(got[name][index : index + 1], tensor, 1e-4)
