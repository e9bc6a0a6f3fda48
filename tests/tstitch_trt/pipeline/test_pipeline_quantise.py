"""A UNet in 8 bits, calibrated on the trajectories of prompts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest

import tstitch_trt
from support.command import Command
from support.compare import relative_error
from support.diffusers_pipelines import bundle
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_trt.verify.verify import verify


@pytest.mark.skipif(find_spec("modelopt") is None, reason='nvidia-modelopt is not installed: pip install ".[quant]"')
def test_a_unet_is_quantised_on_prompts(sd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = bundle("sd15-bksdm-tiny", tmp_path, members={"small": sd / "small", "large": sd / "large"})
    output, file = tmp_path / "int8.bundle", tmp_path / "prompts.txt"
    file.write_text("the cat's whiskers\na horse on mars\n")
    asked = ("--member", "large", "--mode", "int8", "--samples", 32, "--steps", 4, "--guidance", 5)
    said = Command(capfd)(
        "quantise", made, *asked, "--prompt", "an astronaut", "--prompts", file, "-o", output, "--json"
    )
    assert said.code == 0, said.err
    record = said.json
    assert record["prompts"] == ["an astronaut", "the cat's whiskers", "a horse on mars"]
    assert record["schedules"] == ["large", "small:0.4,large"]
    assert all(0 < level["rel_l2"] < 0.05 for level in record["loss"])
    assert all(0 < difference < 0.05 for difference in record["latents"])

    opened = open_bundle(output)
    member = opened.manifest.members["large"]
    graph = onnx.load(opened.path(member.onnx[0])).graph
    readers = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    eight = [node.name for node in readers if made_by.get(node.input[0]) == "DequantizeLinear"]
    assert len(eight) == len(record["layers"])
    (check,) = verify(output, members=["large"], samples=1).engines
    assert check.status == "passed"
    assert {c.inputs for c in check.comparisons} == {"random", "trajectory"}
    latents = []
    for path in (made, output):
        with tstitch_trt.load(path) as runtime:
            latents.append(runtime.sample(prompt="a horse", steps=4, seed=1, fraction=0.0, decode=False).latents)
    difference = relative_error(latents[1], latents[0])
    assert 0 < difference < 0.05
