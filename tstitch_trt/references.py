"""What engines are verified against, and on what: the members' own ONNX and PyTorch, random and recorded inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends import open_backend
from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle import Bundle
from tstitch_engines.device import Device, open_device
from tstitch_engines.manifest import SCHEMA, EngineIdentity, Manifest, Member
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_trt.caller import Arrays, Caller, narrow, widen
from tstitch_trt.recorder import Recorder, needs_widening, widen_graph, widened
from tstitch_trt.runtime import Runtime

__all__ = ["References"]

_STEPS: Final = 8  # of the recorded trajectory, at least
_IMAGES: Final = 2
_GUIDANCE: Final = 1.5  # of the recorded trajectory where the bundle's own is off


class References:
    """The reference results of one bundle.

    ONNX Runtime runs every member's own graph on the CPU without any optimisation. It has no bfloat16 kernels there: a
    bf16 graph is widened to float32 first, weights and all. PyTorch runs the family's module in float32 on the weights
    of the graph. Inputs are always rounded to the member's precision, so that both sides get the same values.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        largest: int,
        samples: int,
        seed: int,
        threads: int,
        folder: Path,
        checkpoints: Mapping[str, Path] | None = None,
    ) -> None:
        """``largest`` batch that will be asked for; ``folder`` takes widened graphs and must outlive this object.

        Records the trajectory. Raises ``Unavailable`` without ONNX Runtime, ``NotFinite`` when the members' own graphs
        give NaN.
        """
        self._bundle = bundle
        self._checkpoints = dict(checkpoints or {})
        self._samples = samples
        self._seed = seed
        self._device: Device = open_device("cpu")
        self._models: dict[str, Any] = {}
        backend = open_backend("onnxruntime")
        self.version = backend.version()
        profile = ShapeProfile({"B": Range(1, max(largest, 2 * _IMAGES), max(largest, 2 * _IMAGES))})
        self._engines: dict[str, Engine] = {}
        members: dict[str, Member] = {}
        try:
            for name, member in bundle.manifest.members.items():
                model, wide = bundle.path(member.onnx[0]), member
                if needs_widening(member):
                    wide = widened(member)
                    model = widen_graph(model, folder / f"{name}.onnx")
                identity = EngineIdentity(
                    schema=SCHEMA,
                    backend=backend.name,
                    backend_version=self.version,
                    onnx_sha256="",
                    precision=wide.precision,
                    profile=profile,
                    arch=backend.arch("cpu"),
                )
                members[name] = wide
                self._engines[name] = backend.load(
                    model, member=wide, identity=identity, device=self._device, threads=threads
                )
            self._callers = {name: Caller(engine, self._device) for name, engine in self._engines.items()}
            self._pool = self._record(msgspec.structs.replace(bundle.manifest, members=members))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines, self._models = {}, {}

    # --- inputs

    def random(self, name: str, batch: int) -> list[Arrays]:
        """Unit Gaussian samples, timesteps and labels drawn evenly, the null class among them."""
        manifest = self._bundle.manifest
        member, conditioning = manifest.members[name], manifest.conditioning
        found: list[Arrays] = []
        for index in range(self._calls(batch)):
            rng = np.random.default_rng([self._seed, batch, index])
            labels = [*range(conditioning.classes), *([] if conditioning.null is None else [conditioning.null])]
            values: dict[str, NDArray[Any]] = {}
            for spec in member.inputs:
                shape = spec.resolve({"B": batch})
                if spec.name == "timestep":
                    values[spec.name] = (rng.random(shape) * (manifest.noise.steps - 1)).astype(np.float32)
                elif spec.name == "labels":
                    values[spec.name] = rng.choice(labels, shape).astype(np.int64)
                else:
                    values[spec.name] = rng.standard_normal(shape, np.float32)
            found.append(_rounded(values, member))
        return found

    def trajectory(self, name: str, batch: int) -> list[Arrays]:
        """Recorded inputs; the rows of each batch, and the batches together, are spread over all noise levels."""
        rows, count = len(self._pool["timestep"]), self._calls(batch)
        found: list[Arrays] = []
        for index in range(count):
            chosen = (np.arange(batch) * count + index) * rows // (batch * count)
            picked = {key: values[chosen] for key, values in self._pool.items()}
            found.append(_rounded(picked, self._bundle.manifest.members[name]))
        return found

    def _calls(self, batch: int) -> int:
        """At most as many as hold every recorded row."""
        return min(self._samples, -(-len(self._pool["timestep"]) // batch))

    def _record(self, manifest: Manifest) -> dict[str, NDArray[Any]]:
        """The inputs of every call of one trajectory, call after call: ``sample [R,C,H,W]``, ``timestep [R]``..."""
        calls: list[Arrays] = []
        recorders = {name: Recorder(engine, self._device, calls) for name, engine in self._engines.items()}
        runtime = Runtime(Bundle(self._bundle.root, manifest), self._device, "onnxruntime", recorders, 0.0)
        steps = min(max(_STEPS, self._samples), manifest.noise.steps)
        names = tuple(manifest.members)
        guidance = 1.0
        if manifest.conditioning.null is not None:
            guidance = _GUIDANCE if manifest.defaults.guidance == 1 else manifest.defaults.guidance
        runtime.sample(
            labels=[i % manifest.conditioning.classes for i in range(_IMAGES)],
            seed=self._seed,
            steps=steps,
            schedule=[names[i * len(names) // steps] for i in range(steps)],
            guidance=guidance,
            decode=False,
        )
        return {key: np.concatenate([call[key] for call in calls]) for key in calls[0]}

    # --- results

    def onnx(self, name: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        return self._callers[name](inputs)

    def torch_version(self, name: str) -> str:
        """PyTorch's version. Raises ``Unavailable`` when the member can't be run in PyTorch."""
        self._module(name)
        import torch

        return str(torch.__version__)

    def torch(self, name: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        module = self._module(name)
        import torch

        member = self._bundle.manifest.members[name]
        with torch.inference_mode():
            output = module(*(torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in member.inputs))
        return {member.outputs[0].name: output.numpy()}

    def _module(self, name: str) -> Any:
        if name not in self._models:
            from tstitch_trt.eager import checkpoint_module, need_eager, torch_module

            need_eager()
            member = self._bundle.manifest.members[name]
            if name in self._checkpoints and member.quantisation is None:
                self._models[name] = checkpoint_module(name, member, self._checkpoints[name])
            else:
                self._models[name] = torch_module(name, member, [self._bundle.path(part) for part in member.onnx])
        return self._models[name]


def _rounded(values: Arrays, member: Member) -> Arrays:
    return {spec.name: widen(narrow(values[spec.name], spec.dtype), spec.dtype) for spec in member.inputs}
