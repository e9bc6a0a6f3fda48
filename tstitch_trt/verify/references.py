"""The references of verification (the networks' own ONNX, and PyTorch) and its inputs (random and recorded)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends import open_backend
from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import Member, Network
from tstitch_engines.compile.load import load_own
from tstitch_engines.device.base import Device
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import OutOfProfile, TStitchError, Unavailable
from tstitch_engines.host_call import Arrays, HostRunner, from_storage, to_storage
from tstitch_engines.spec import Range
from tstitch_trt.reference.network_inputs import Recordings
from tstitch_trt.reference.recorder import cpu_identity, needs_widening, own_files, widen_graph, widened
from tstitch_trt.verify.random_inputs import random_inputs

__all__ = ["References"]

_ANY: Final = Range(1, 1, 1 << 24)  # ONNX Runtime takes any size that the graph does


class References:
    """The reference results of one bundle.

    ONNX Runtime runs every network's own graph on the CPU without any optimisation, a bf16 graph widened to float32.
    PyTorch runs the family's module in float32 with the weights of the graph or of a checkpoint. Inputs are rounded to
    the network's precision, so that all get the same values. A graph is loaded when it is first needed. ``notes``: the
    version of each library, and why PyTorch or the recorded inputs of a network are left out.
    """

    def __init__(
        self,
        bundle: Bundle,
        samples: int,
        seed: int,
        threads: int,
        folder: Path,
        checkpoints: Mapping[str, Path] | None = None,
    ) -> None:
        """``folder`` takes widened graphs and must outlive this object. Raises ``Unavailable`` without ONNX Runtime."""
        self._bundle = bundle
        self._networks: dict[str, Network] = bundle.manifest.networks()
        self._checkpoints = dict(checkpoints or {})
        self._samples = samples
        self._seed = seed
        self._threads = threads
        self._folder = folder
        self._device: Device = open_device("cpu")
        self._backend = open_backend("onnxruntime")
        self._models: dict[str, Any] = {}
        self._engines: dict[str, Engine] = {}
        self._runners: dict[str, HostRunner] = {}
        manifest = msgspec.structs.replace(
            bundle.manifest,
            members={name: widened(member) for name, member in bundle.manifest.members.items()},
            parts={name: widened(part) for name, part in bundle.manifest.parts.items()},
        )
        self._wide = manifest.networks()
        self._recordings = Recordings(bundle, manifest, self._engine, self._device, samples=samples, seed=seed)
        self.notes = {"onnxruntime": self._backend.version()}

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines, self._runners, self._models = {}, {}, {}

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            network, files = self._networks[name], [self._bundle.path(part) for part in self._networks[name].onnx]
            if needs_widening(network):
                model = widen_graph(files[0], self._folder / f"{name}.onnx")
                files = [model.with_name(part.path) for part in own_files(model)]
            profile = network.profile_of(dict.fromkeys(network.dims, _ANY))
            identity = cpu_identity(self._backend, self._wide[name], profile)
            self._engines[name] = load_own(
                self._backend, files, self._wide[name], identity, self._device, threads=self._threads
            )
        return self._engines[name]

    # --- inputs

    def random(self, name: str, sizes: Mapping[str, int]) -> list[Arrays]:
        """See ``random_inputs``."""
        order = [sizes[dim] for dim in sorted(sizes)]
        return [
            self._rounded(
                name,
                random_inputs(self._bundle.manifest, name, sizes, np.random.default_rng([self._seed, *order, index])),
            )
            for index in range(self._samples)
        ]

    def trajectory(self, name: str, batch: int, size: tuple[int, int] | None = None) -> list[Arrays]:
        """Recorded inputs, each batch spread over all noise levels; no more batches than hold every recorded row.

        ``size``: height and width of the latent, by default the bundle's own. Where no trajectory gives such inputs the
        list is empty and ``notes`` say why. Raises ``NotFinite`` when the bundle's own graphs give NaN.
        """
        latent = self._bundle.manifest.latent
        try:
            pool = self._recordings.rows(name, size or (latent.height, latent.width))
        except (Unavailable, OutOfProfile) as reason:
            self.leave_out(f"recorded inputs of {name}", reason)
            return []
        rows = len(next(iter(pool.values())))
        count = min(self._samples, -(-rows // batch))
        found: list[Arrays] = []
        for index in range(count):
            chosen = (np.arange(batch) * count + index) * rows // (batch * count)
            found.append(self._rounded(name, {key: values[chosen] for key, values in pool.items()}))
        return found

    def leave_out(self, what: str, reason: TStitchError) -> None:
        self.notes[what] = f"left out: {reason.message} ({reason.hint})"

    def _rounded(self, name: str, values: Arrays) -> Arrays:
        specs = self._networks[name].inputs
        return {spec.name: from_storage(to_storage(values[spec.name], spec.dtype), spec.dtype) for spec in specs}

    # --- results

    def onnx(self, name: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        if name not in self._runners:
            self._runners[name] = HostRunner(self._engine(name), self._device)
        return self._runners[name](inputs)

    def runs_torch(self, name: str) -> bool:
        """Whether the network can be run in PyTorch."""
        try:
            self._module(name)
        except Unavailable as reason:
            if "torch" not in self.notes:
                self.leave_out("torch", reason)
            return False
        import torch

        self.notes["torch"] = str(torch.__version__)
        return True

    def torch(self, name: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        module = self._module(name)
        import torch

        network = self._networks[name]
        with torch.inference_mode():
            found = module(*(torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in network.inputs))
        outputs = found if isinstance(found, (tuple, list)) else (found,)
        return {spec.name: output.numpy() for spec, output in zip(network.outputs, outputs, strict=True)}

    def _module(self, name: str) -> Any:
        if name not in self._models:
            from tstitch_trt.reference.torch_module import checkpoint_module, need_eager, torch_module

            need_eager()
            network = self._networks[name]
            quantised = isinstance(network, Member) and network.quantisation is not None
            if name in self._checkpoints and not quantised:
                self._models[name] = checkpoint_module(name, network, self._checkpoints[name], self._word(name))
            else:
                files = [self._bundle.path(part) for part in network.onnx]
                self._models[name] = torch_module(name, network, files, self._word(name))
        return self._models[name]

    def _word(self, name: str) -> str:
        return "member" if name in self._bundle.manifest.members else "part"
