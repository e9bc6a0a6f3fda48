"""Real inputs of every network of a bundle, recorded while its own graphs draw pictures of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import Manifest, Network
from tstitch_engines.device.base import Device
from tstitch_engines.errors import Unavailable
from tstitch_engines.host_call import Arrays
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_trt.plan.plan import Plan
from tstitch_trt.reference.recorder import Recorder
from tstitch_trt.request.controlnet import CONTROLNET
from tstitch_trt.request.synthetic import synthetic_pictures, synthetic_request
from tstitch_trt.runtime.runtime import Runtime

__all__ = ["Recordings", "Rows"]

_STEPS: Final = 8  # of a recorded trajectory, at least
_IMAGES: Final = 2
_GUIDANCE: Final = 1.5  # of a recorded trajectory where the bundle's own is off
_PROMPTS: Final = ("a red fox in the snow", "an oil painting of the sea")

Rows = dict[str, NDArray[Any]]  # inputs by name, one row per image and half, call after call
Size = tuple[int, int]  # height and width of the latent


class Recordings:
    """Each trajectory is run when it is first needed.

    Members with equal inputs share one trajectory over all noise levels; each runs a part of it, and the inputs of one
    serve all. Text encoders read prompts, the VAE's decoder gets final latents, its encoder the pictures decoded from
    them, and the ControlNet runs beside its members.
    """

    def __init__(
        self,
        bundle: Bundle,
        manifest: Manifest,
        engine: Callable[[str], Engine],
        device: Device,
        *,
        samples: int,
        seed: int,
    ) -> None:
        """``manifest``: of the networks as ``engine`` gives them by name, for any size on ``device``."""
        self._bundle = Bundle(bundle.root, manifest)
        self._engine = engine
        self._device = device
        self._steps = min(max(_STEPS, samples), manifest.noise.steps)
        self._seed = seed
        self._pools: dict[tuple[tuple[str, ...], Size], dict[str, Rows]] = {}

    def rows(self, name: str, size: Size) -> Rows:
        """What the network ``name`` is given while latents of ``size`` are drawn.

        Raises ``Unavailable`` for one that no request of this bundle runs, ``OutOfProfile`` for a size that is not
        that of all networks beside it, ``NotFinite`` when the bundle's own graphs give NaN.
        """
        key = (self._group(name), size)
        if key not in self._pools:
            self._pools[key] = self._record(*key)
        return self._pools[key][name]

    def _group(self, name: str) -> tuple[str, ...]:
        """The members of the trajectory on which ``name`` runs."""
        manifest = self._bundle.manifest
        if name not in manifest.members:
            name = next((member for member in manifest.members if name in self._parts((member,))), name)
        if name not in manifest.members:
            raise Unavailable(
                f"no request to this bundle runs the part {name!r}", hint="it is compared on random inputs alone"
            )
        wanted = _signature(manifest.members[name])
        return tuple(other for other, member in manifest.members.items() if _signature(member) == wanted)

    def _parts(self, group: Sequence[str]) -> list[str]:
        """The parts that run while the members ``group`` draw."""
        manifest = self._bundle.manifest
        members = [manifest.members[name] for name in group]
        wanted = {"vae_decoder", "vae_encoder", *(e for m in members if m.text is not None for e in m.text.encoders)}
        if any(member.controlled for member in members):
            wanted.add(CONTROLNET)
        return [name for name in manifest.parts if name in wanted]

    def _record(self, group: tuple[str, ...], size: Size) -> dict[str, Rows]:
        manifest, parts = self._bundle.manifest, self._parts(group)
        shared: list[Arrays] = []
        calls: dict[str, list[Arrays]] = {name: shared if name in group else [] for name in (*group, *parts)}
        engines: dict[str, Engine] = {
            name: Recorder(self._engine(name), self._device, into, _profile(manifest.networks()[name], size))
            for name, into in calls.items()
        }
        runtime = Runtime(self._bundle, self._device, "onnxruntime", engines, 0.0)
        defaults = manifest.defaults
        guidance = _GUIDANCE if defaults.guidance == 1 else defaults.guidance
        settings: dict[str, Any] = {
            "steps": self._steps,
            "guidance": guidance if manifest.conditioning.guidable else 1.0,
            # equal shares; steps are not counted here, since a solver may make one evaluation more
            "schedule": ",".join([*(f"{name}:{1 / len(group):.4g}" for name in group[:-1]), group[-1]]),
        }
        asked = self._keywords(group, runtime.plan(**settings), size)
        decode = "vae_decoder" in parts
        images = runtime.sample(seed=self._seed, decode=decode, **asked, **settings).images
        if "vae_encoder" in parts:
            if images is None:
                factor = manifest.decoder.factor
                images = synthetic_pictures(_IMAGES, factor * size[0], factor * size[1], seed=2)
            calls["vae_encoder"].append({"image": images.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1})
        # the engines outlive the runtime, so it is not closed
        return {name: {key: np.concatenate([c[key] for c in into]) for key in into[0]} for name, into in calls.items()}

    def _keywords(self, group: Sequence[str], plan: Plan, size: Size) -> dict[str, Any]:
        manifest = self._bundle.manifest
        backend = next((r.identity.backend for r in manifest.members[group[0]].engines), "")
        asked = synthetic_request(manifest, backend, plan, _IMAGES, prompts=_PROMPTS, control=True, size=size)
        factor = manifest.decoder.factor
        return {**asked, "height": factor * size[0], "width": factor * size[1]}


def _signature(network: Network) -> tuple[object, ...]:
    return tuple((spec.name, spec.shape) for spec in network.inputs)


def _profile(network: Network, size: Size) -> ShapeProfile:
    """A profile for a few images of this size: buffers are as large as a profile allows."""
    found = {"B": Range(1, 2 * _IMAGES, 2 * _IMAGES), "T": _tokens(network)}
    found |= {name: Range(side, side, side) for name, side in zip("HW", size, strict=True)}
    return network.profile_of(found)


def _tokens(network: Network) -> Range:
    known = [record.identity.profile.dims.get("T") for record in network.engines]
    most = max((allowed.max for allowed in known if allowed is not None), default=3 * 77)
    return Range(1, min(77, most), most)
