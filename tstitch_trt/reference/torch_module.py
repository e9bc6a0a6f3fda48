"""The PyTorch modules of a bundle's networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadCheckpoint, BadInput, Unavailable
from tstitch_engines.needs import require

if TYPE_CHECKING:
    from pathlib import Path

    from tstitch_engines.bundle.manifest import Network

__all__ = ["checkpoint_module", "dit_weights", "need_eager", "torch_module"]

_PUBLISHED: Final = {"depth", "width", "heads", "patch", "size", "channels", "labels", "learn_sigma", "mlp_ratio"}


def dit_weights(model: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
    """The state dict with these names and shapes, read from an exported DiT's ONNX graph.

    The exporter keeps the parameters' names, except for the weights of linear layers: those are transposed and become
    the right side of a MatMul, to which ``NAME.bias`` is added. Raises ``Unavailable`` when one can't be found.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(model)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    adders = {name: node for node in graph.node if node.op_type == "Add" for name in node.input if name not in makers}
    found: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        array = stored.get(name)
        adder = adders.get(name.removesuffix(".weight") + ".bias")
        if array is None and adder is not None:
            product = next((makers[i] for i in adder.input if i in makers and makers[i].op_type == "MatMul"), None)
            array = stored[product.input[1]].T if product is not None and product.input[1] in stored else None
        if array is None or array.shape != shape:
            raise Unavailable(
                f"{model.name} does not hold {name} {list(shape)} where an exported DiT has it",
                hint="only members of the published DiT layout have a PyTorch side; in bench leave --against out",
            )
        found[name] = np.array(array, np.float32)
    return found


def checkpoint_module(name: str, network: Network, path: Path, word: str = "member") -> Any:
    """The checkpoint of the network ``name`` as a PyTorch module, float32, loaded by its family.

    ``word``: ``member`` or ``part``. Needs torch, and what the family needs. Raises ``BadCheckpoint`` for a file other
    than the one recorded.
    """
    from tstitch_engines.bundle.files import hash_file
    from tstitch_engines.bundle.manifest import Member
    from tstitch_export.families import open_family

    family = open_family(network.family)
    for key, what in (("lora", "LoRAs"), ("textual_inversion", "textual inversions")):
        if not network.config.get(key):
            continue
        raise Unavailable(
            f"{word} {name!r} holds {what} ({network.config[key]}): the checkpoint alone is another model",
            hint=f"leave out --{word} {name}=...; ONNX Runtime is compared with all the same",
        )
    # a member's config says `heads` where the option is called `num_heads`
    known = {
        option: network.config.get(option, network.config.get(option.removeprefix("num_"))) for option in family.options
    }
    if isinstance(network, Member):  # the module is the same whatever it was trained with
        known |= {"prediction": network.parametrisation, "noise": "linear"}
    given = {option: value for option, value in known.items() if value is not None and option in family.options}
    if not path.exists():
        raise BadCheckpoint(f"{path} does not exist", hint=f"check the path of --{word} {name}=CHECKPOINT")
    found = []
    problem: BadCheckpoint | BadInput | None = None
    for options in ({}, given):  # some checkpoints need options, others refuse those that they state themselves
        try:
            found.append(family.inspect(path, options))
        except (BadCheckpoint, BadInput) as error:
            problem = error
    if not found:
        assert problem is not None, "no inspection and no error"
        raise problem
    same = [one for one in found if dict(one.config) == network.config]
    inspection = (same or found)[-1]
    got = [hash_file(file)[0] for file in inspection.files]
    if got != [source.sha256 for source in network.sources]:
        want = ", ".join(f"{source.name} (sha256 {source.sha256[:16]})" for source in network.sources)
        raise BadCheckpoint(
            f"{path} (sha256 {', '.join(each[:16] for each in got)}) is not what {word} {name!r} was made from: {want}",
            hint=f"give the checkpoint that the bundle was built from: --{word} {name}=CHECKPOINT",
        )
    if not same:
        raise BadCheckpoint(
            f"{path} was exported with options that it does not tell: {word} {name!r} is {network.config}, and the "
            f"checkpoint says {dict(inspection.config)}",
            hint=f"leave out --{word} {name}=...; ONNX Runtime is compared with all the same",
        )
    return family.load(inspection)


def need_eager() -> None:
    """Raises ``Unavailable`` without torch and onnx."""
    for library in ("onnx", "torch"):
        require(library, "comparing with PyTorch")


def torch_module(name: str, network: Network, files: list[Path], word: str = "member") -> Any:
    """The network ``name`` as a PyTorch module, float32, with the weights of its ONNX ``files``.

    ``word``: ``member`` or ``part``. Raises ``Unavailable`` for another family than DiT in its published layout. Needs
    torch and onnx.
    """
    from tstitch_engines.bundle.manifest import Member

    if isinstance(network, Member) and network.quantisation is not None:
        raise Unavailable(
            f"member {name!r} is quantised to {network.precision}, which has no PyTorch module",
            hint="compare the bundle that it was made from; in bench leave --against out",
        )
    if network.family != "dit" or not network.config.keys() >= _PUBLISHED:
        raise Unavailable(
            f"no PyTorch module can be made for {word} {name!r} of family {network.family!r} from its ONNX alone; "
            "known: dit in its published layout",
            hint=f"verify with the checkpoint: --{word} {name}=CHECKPOINT"
            + ("; in bench leave --against out" if word == "member" else ""),
        )
    import torch

    from tstitch_export.families.dit.config import DiTConfig
    from tstitch_export.families.dit.layout import expected_shapes
    from tstitch_export.families.dit.model import DiT

    sizes: dict[str, Any] = {
        name: int(network.config[name]) for name in ("depth", "width", "heads", "patch", "size", "channels")
    }
    config = DiTConfig(
        **sizes,
        classes=int(network.config["labels"]) - 1,
        learn_sigma=bool(network.config["learn_sigma"]),
        mlp_ratio=float(network.config["mlp_ratio"]),
    )
    packed = next((file for file in files if file.suffix == ".safetensors"), None)
    if packed is not None:  # a shipped member: its graph refers to the weights in this file
        from safetensors.numpy import load_file

        weights = {key: value.astype(np.float32) for key, value in load_file(packed).items()}
    else:
        weights = dit_weights(files[0], expected_shapes(config))
    module = DiT(config).eval()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return module
