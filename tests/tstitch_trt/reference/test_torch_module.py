"""A checkpoint as the module that a member was made from."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from support.dits import published_state
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import Member, Source
from tstitch_export.families import open_family
from tstitch_trt.reference.torch_module import checkpoint_module


def test_a_checkpoint_that_was_built_with_options_for_its_training(tmp_path: Path) -> None:
    """It says that it predicts a score, and the build was told otherwise."""
    path, state = tmp_path / "dit.safetensors", published_state()
    save_file(state, path, {"modelspec.prediction_type": "score"})
    family = open_family("dit")
    found = family.inspect(path, {"num_heads": 4, "prediction": "eps"})
    sha256, size = hash_file(path)
    member = Member(
        family="dit",
        parametrisation="eps",
        precision="fp32",
        learned_variance=True,
        inputs=family.inputs(found, "fp32"),
        outputs=family.outputs(found, "fp32"),
        onnx=(),
        sources=(Source(name=path.name, sha256=sha256, bytes=size),),
        check=None,
        config=dict(found.config),
    )
    module = checkpoint_module("small", member, path)
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in state.items())
