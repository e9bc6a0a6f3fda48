"""Every engine of a whole pipeline against PyTorch on the checkpoints that it was built from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.diffusers_pipelines import bundle
from support.tiny_families import controlnet_folder
from tstitch_engines.errors import BadCheckpoint
from tstitch_trt.verify.verify import verify


def test_members_and_parts_equal_pytorch_on_their_checkpoints(sd: Path, tmp_path: Path) -> None:
    controlnet_folder(tmp_path / "controlnet", "one")
    made = bundle(
        "sd15-bksdm-tiny",
        tmp_path,
        members={"small": sd / "small", "large": sd / "large"},
        parts={"controlnet": tmp_path / "controlnet"},
    )
    names = ("large", "text_encoder", "vae_decoder", "vae_encoder")
    checkpoints = {**dict.fromkeys(names, sd / "large"), "small": sd / "small", "controlnet": tmp_path / "controlnet"}
    result = verify(made, samples=1, checkpoints=checkpoints)
    assert {check.member for check in result.engines} == checkpoints.keys()
    for check in result.engines:
        assert check.status == "passed", check.reason
        errors = [c.error.rel_l2 or 0 for c in check.comparisons if c.against == "torch"]
        assert {c.inputs for c in check.comparisons if c.against == "torch"} == {"random", "trajectory"}
        assert 0 < max(errors) < 1e-5

    other = Path(shutil.copytree(sd / "large", tmp_path / "other"))
    (other / "vae" / "config.json").write_text((other / "vae" / "config.json").read_text() + "\n")
    with pytest.raises(BadCheckpoint, match="is not what part 'vae_decoder' was made from") as caught:
        verify(made, samples=1, members=["vae_decoder"], checkpoints={"vae_decoder": other})
    assert "--part vae_decoder=CHECKPOINT" in caught.value.hint
