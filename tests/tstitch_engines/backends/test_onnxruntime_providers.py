"""The providers of ONNX Runtime: what is asked for is used or refused. TensorRT's runs in ``test_gpu_engines.py``."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnxruntime
import pytest

from support.manifests import member
from support.recordings import others_may_record
from support.tiny import TinyPair
from tstitch_engines.backends import onnxruntime as backend
from tstitch_engines.backends.onnxruntime import OnnxRuntimeBackend, tensorrt_options
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.cache import default_root
from tstitch_engines.bundle.manifest import SCHEMA, EngineIdentity
from tstitch_engines.device.host import HostDevice
from tstitch_engines.errors import BadInput, Unavailable, UnknownName
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.build import build


def test_a_provider_that_is_not_there(tiny_pair: TinyPair, tmp_path: Path) -> None:
    def refuse(error: type[Exception], match: str, provider: str, device: str) -> None:
        with pytest.raises(error, match=match):
            build(
                tiny_pair.recipe("small", "large"),
                members={name: tiny_pair.checkpoint(name) for name in ("small", "large")},
                output=tmp_path / "refused.bundle",
                options={"provider": provider},
                device=device,
            )
        assert not list(tmp_path.iterdir())

    refuse(UnknownName, "unknown provider of ONNX Runtime 'tensorrtx'", "tensorrtx", "cpu")
    for provider in ("cuda", "tensorrt"):
        refuse(BadInput, f"provider = {provider}: it runs on a GPU", provider, "cpu")
    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        refuse(Unavailable, "no (TensorRT|CUDA) provider|NVIDIA driver|needs cuda-core", "tensorrt", "cuda")


@pytest.mark.parametrize(("precision", "flags"), [("fp32", "00"), ("fp16", "10"), ("bf16", "01")])
def test_what_tensorrt_is_told_of_an_engine(precision: str, flags: str) -> None:
    """One size for each input at each end of the profile, in the order of the inputs."""
    profile = ShapeProfile({"B": Range(1, 2, 6)})
    identity = EngineIdentity(
        schema=SCHEMA, backend="onnxruntime", backend_version="1", onnx_sha256="", precision=precision,  # type: ignore[arg-type]
        profile=profile, arch="sm_90", options={"provider": "tensorrt"},
    )  # fmt: skip
    told = tensorrt_options(msgspec.structs.replace(member(), precision=precision), identity, "cuda:1", "H100", 77)
    assert told["trt_profile_min_shapes"] == "sample:1x4x8x8,timestep:1,labels:1"
    assert told["trt_profile_opt_shapes"] == "sample:2x4x8x8,timestep:2,labels:2"
    assert told["trt_profile_max_shapes"] == "sample:6x4x8x8,timestep:6,labels:6"
    assert told["trt_fp16_enable"] + told["trt_bf16_enable"] == flags
    assert (told["device_id"], told["user_compute_stream"]) == ("1", "77")
    assert Path(told["trt_engine_cache_path"]).is_relative_to(default_root())
    assert "user_compute_stream" not in tensorrt_options(member(), identity, "cuda", "H100")
    tuned = tensorrt_options(member(), msgspec.structs.replace(identity, onnx_sha256="other weights"), "cuda:1", "H100")
    moved = tensorrt_options(member(), identity, "cuda:1", "H200")
    assert len({one["trt_engine_cache_path"] for one in (told, tuned, moved)}) == 3


class Recording(HostDevice):
    graphs = True


@pytest.mark.parametrize(("device", "free"), [(Recording(), False), (HostDevice(), True)], ids=["graphs", "none"])
def test_nobody_records_while_a_session_begins_or_ends(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, device: HostDevice, free: bool
) -> None:
    """It allocates and frees, and with the TensorRT provider it compiles. On the host nothing is recorded."""
    seen: list[bool] = []

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __del__(self) -> None:
            seen.append(others_may_record())

    def opening(path: Path, beside: object, *, settings: object, providers: object) -> Session:
        seen.append(others_may_record())
        return Session(str(path), settings, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(backend, "open_session", opening)
    bundle = open_bundle(tiny_pair.bundle)
    network = bundle.manifest.members["small"]
    record = network.engines[0]
    path = bundle.path(record.files[0])
    engine = OnnxRuntimeBackend().load(path, member=network, identity=record.identity, device=device, threads=1)
    engine.close()
    assert seen == [free, free]
    assert others_may_record()
