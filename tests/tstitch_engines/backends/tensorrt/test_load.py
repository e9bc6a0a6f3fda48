"""Loading TensorRT engines, as far as a machine without a GPU goes: every file or place that is wrong is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

import tstitch_trt
from support.bindings import unpacked
from support.command import Command, refused
from support.tensorrt_builds import compile_member, shipped_small
from tstitch_engines.backends import open_backend
from tstitch_engines.backends.tensorrt import TensorRtBackend, engine, read_plan_header
from tstitch_engines.backends.tensorrt.engine import TensorRtEngine
from tstitch_engines.backends.tensorrt.flavour import RTX, TENSORRT
from tstitch_engines.backends.tensorrt.library import open_library
from tstitch_engines.backends.tensorrt.options import resolve
from tstitch_engines.backends.tensorrt.plan import check_plan
from tstitch_engines.backends.tensorrt.plan_header import PlanHeader, parse_plan_header
from tstitch_engines.bundle.manifest import SCHEMA, EngineIdentity
from tstitch_engines.device import cuda
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadBundle, BadEngine, BadInput, Unavailable, UnknownName
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.build import build
from tstitch_trt.doctor import examine

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")

OTHER = "1.6.1.120"


@pytest.fixture(scope="module")
def plan(rtx: TensorRtBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    member, model = shipped_small()
    return compile_member(rtx, member, model, tmp_path_factory.mktemp("plan") / "small.rtx")


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def identity(version: str, arch: str = "rtx-default", **options: Any) -> EngineIdentity:
    return EngineIdentity(
        schema=SCHEMA,
        backend="tensorrt-rtx",
        backend_version=version,
        onnx_sha256="0" * 64,
        precision="fp32",
        profile=ShapeProfile({"B": Range(1, 2, 4)}),
        arch=arch,
        options=options,
    )


def test_a_library_without_attention_gets_an_older_opset(rtx: TensorRtBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rtx.opset_limits({}) == (20, 23, "")
    assert rtx.opset_limits({"attention": "apart"})[:2] == (20, 22)
    assert rtx.opset_limits({"attention": "fused"})[:2] == (23, 23)
    monkeypatch.delattr(open_library(RTX), "IAttention")
    assert rtx.opset_limits({}) == (20, 22, f"TensorRT-RTX {rtx.version()} imports no Attention, the node of opset 23")
    with pytest.raises(BadInput, match="has no attention=fused"):
        rtx.build_arch("cpu", {"attention": "fused"})


def test_what_is_said_of_an_engine_that_computes_wrongly(rtx: TensorRtBackend) -> None:
    stored = msgspec.structs.replace(identity(rtx.version()), precision="fp16")
    assert "--option attention=apart" in rtx.doubt(stored)
    assert rtx.doubt(msgspec.structs.replace(stored, precision="fp32")) == ""
    assert rtx.doubt(msgspec.structs.replace(stored, options={"attention": "apart"})) == ""


def load(rtx: TensorRtBackend, path: Path) -> Any:
    member, _ = shipped_small()
    return rtx.load(path, member=member, identity=identity(rtx.version()), device=open_device("cpu"), threads=0)


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


# --- the header


def test_a_real_header_is_read_and_a_changed_one_is_not_guessed_at(plan: Path) -> None:
    head = plan.read_bytes()[:64]
    header = parse_plan_header(head)
    assert header == read_plan_header(plan)
    assert header is not None
    assert header.size == plan.stat().st_size
    for damage in (
        b"",
        head[:63],
        b"X" + head[1:],
        head[:8] + b"\x03" + head[9:],  # another format
        head[:28] + b"?" + head[29:],
        head[:32] + bytes(4) + head[36:],  # for no GPU
        head[:33] + b"\x01" + head[34:],  # for a GPU that has no name here
        head[:16] + bytes(8) + head[24:],
    ):
        assert parse_plan_header(damage) is None


def test_which_gpus_a_header_covers() -> None:
    header = PlanHeader("1.7.1.116", 100, ((8, 6), (12, 0)), later=False)
    assert [header.runs_on(c) for c in ((8, 6), (12, 0), (8, 9), (12, 1))] == [True, True, False, False]
    later = header._replace(later=True)
    assert [later.runs_on(c) for c in ((8, 9), (9, 0), (12, 1), (13, 0))] == [False, False, True, True]
    assert (header.gpus(), later.gpus()) == ("8.6, 12.0", "8.6, 12.0 and later")


# --- files that are wrong


def test_a_truncated_plan(rtx: TensorRtBackend, plan: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.rtx"
    cut.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(BadEngine, match=rf"has {cut.stat().st_size} bytes, its header says .*truncated") as caught:
        load(rtx, cut)
    assert "--backend tensorrt-rtx" in caught.value.hint
    cut.write_bytes(b"vtrt")
    with pytest.raises(BadEngine, match="no TensorRT-RTX plan: it has 4 bytes"):
        load(rtx, cut)


def test_a_foreign_file(rtx: TensorRtBackend) -> None:
    _, model = shipped_small()
    with pytest.raises(BadEngine, match=r"small.onnx is no TensorRT-RTX plan: it starts with"):
        load(rtx, model)
    with pytest.raises(BadEngine, match="can't be read"):
        load(rtx, model.with_name("absent.rtx"))


def test_a_plan_of_the_other_flavour(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(BadEngine, match=r"is a TensorRT-RTX 1\..* plan; wanted is one of TensorRT") as caught:
        check_plan(TENSORRT, "10.16.1.11", plan, None)
    assert "--backend tensorrt-rtx" in caught.value.hint
    (tmp_path / "short.trt").write_bytes(b"ptrt")
    with pytest.raises(BadEngine, match="has 4 bytes: truncated"):
        check_plan(TENSORRT, "10.16.1.11", tmp_path / "short.trt", None)


def test_a_plan_for_other_gpus(rtx: TensorRtBackend, plan: Path) -> None:
    """A list of GPUs is a list. What is in the library's own, which has no end, the library may say."""
    check_plan(RTX, rtx.version(), plan, (8, 9))
    check_plan(RTX, rtx.version(), plan, (13, 0))
    check_plan(RTX, rtx.version(), plan, (9, 0))
    listed = plan.with_name("listed.rtx")
    compile_member(rtx, *shipped_small(), listed, options={"compute-capabilities": "8.6"})
    with pytest.raises(BadEngine, match=r"is for GPUs of compute capability 8.6; this one has 9.0") as caught:
        check_plan(RTX, rtx.version(), listed, (9, 0))
    assert "--device cuda" in caught.value.hint


@pytest.mark.parametrize(("arch", "said"), [("sm_89", False), ("sm_130", False), ("sm_90", True)])
def test_a_gpu_that_is_not_in_the_library_s_own_list_is_warned_of(
    rtx: TensorRtBackend,
    plan: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    arch: str,
    said: bool,
) -> None:
    member, _ = shipped_small()
    monkeypatch.setattr(rtx, "arch", lambda device: arch)
    monkeypatch.setattr(engine, "TensorRtEngine", lambda *args: args)
    place: Any = SimpleNamespace(name="cuda:0")
    rtx.load(plan, member=member, identity=identity(rtx.version()), device=place, threads=0)
    assert ("12.1 and later and cuda:0 has 9.0: TensorRT-RTX may refuse it" in caplog.text) == said


def test_a_gpu_that_tensorrt_rtx_does_not_support(rtx: TensorRtBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """H200: neither asked for by its name nor by the list of an engine of before. The library's own list can be."""
    monkeypatch.setattr(cuda, "compute_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "gpu_and_driver", lambda index: ("NVIDIA H200", "CUDA 13.0"))
    recorded = rtx.options_for({"compute-capabilities": "8.9"}, "cuda")
    for options in ({}, recorded, {"compute-capabilities": "9.0"}):
        with pytest.raises(Unavailable, match=r"not support cuda \(NVIDIA H200, .* 9.0\); it supports 7.5") as caught:
            rtx.build_arch("cuda", options)
        assert "--option compute-capabilities=default" in caught.value.hint
    default = {"compute-capabilities": "default"}
    assert rtx.options_for(default, "cuda") == default
    assert rtx.build_arch("cuda", default) == rtx.build_arch("cpu", default) == rtx.build_arch("cpu", {})
    with pytest.raises(UnknownName):
        rtx.build_arch("cpu", {"compute-capabilities": "9.0"})
    (found,) = [one for one in examine().checks if one.name == "tensorrt-rtx on cuda"]
    assert not found.ok
    assert "does not support cuda (NVIDIA H200" in found.detail


def test_a_plan_of_another_version(rtx: TensorRtBackend, tmp_path: Path, wheels: Path) -> None:
    """Compiled for real by another version, which is put before the installed one."""
    site = tmp_path / "site"
    for name in ("bindings", "libs"):
        shutil.copytree(unpacked(f"tensorrt_rtx_cu13_{name}=={OTHER}", wheels), site, dirs_exist_ok=True)
    script = tmp_path / "compile.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom support.tensorrt_builds import compile_member, shipped_small\n"
        "from tstitch_engines.backends import open_backend\n"
        "backend = open_backend('tensorrt-rtx')\n"
        "compile_member(backend, *shipped_small(), Path(sys.argv[1]))\nprint(backend.version())\n"
    )
    other = tmp_path / "other.rtx"
    done = subprocess.run(
        [sys.executable, script, other],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if rtx.version() == OTHER:
        pytest.skip("the installed version is the other one")
    header = read_plan_header(other)
    assert header is not None
    assert header.version == OTHER == done.stdout.strip()
    with pytest.raises(BadEngine, match=f"compiled by TensorRT-RTX {OTHER}; installed is {rtx.version()}") as caught:
        load(rtx, other)
    assert "compile it again" in caught.value.hint
    assert f"tensorrt-rtx-cu13-libs=={OTHER}" in caught.value.hint


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_what_the_library_itself_refuses_is_passed_on(rtx: TensorRtBackend, plan: Path) -> None:
    """A sound plan where CUDA does not start: the library's own words are in the error."""
    member, _ = shipped_small()
    place: Any = SimpleNamespace(activate=lambda: None, stream_handle=1, name="cuda:0")
    with pytest.raises(BadEngine, match=r"can't load the engine small.rtx: .*cudaError 35") as caught:
        TensorRtEngine(RTX, open_library(RTX), plan, member, identity(rtx.version()), place)
    assert caught.value.hint


# --- places that are wrong


def test_on_the_cpu(rtx: TensorRtBackend, plan: Path) -> None:
    with pytest.raises(Unavailable, match="TensorRT-RTX runs on NVIDIA GPUs only, though it compiles here") as caught:
        load(rtx, plan)
    assert "--device cuda" in caught.value.hint


def test_a_bundle_from_the_command_line(tmp_path: Path, command: Command) -> None:
    output = tmp_path / "fashion.bundle"
    made = command("build", "fashion", "--backend", "tensorrt-rtx", "--batch", "1:2:4", "-o", output)
    assert made.code == 0, made.err
    version = open_library(RTX).__version__
    shown = command("inspect", output)
    assert f"plan       TensorRT-RTX {version}, compute capability 8.0, 8.6, 8.9" in shown.out
    assert "attention" not in shown.out
    document = command("inspect", output, "--json").json
    assert document["members"]["small"]["engines"][0]["plan"]["version"] == version
    refused(command("sample", output), "TensorRT-RTX runs on NVIDIA GPUs only", "--backend onnxruntime")
    with pytest.raises(Unavailable):
        tstitch_trt.load(output, device="cuda")
    (engine,) = (output / "small" / "engines").iterdir()
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    with pytest.raises(BadBundle, match="is altered"):
        tstitch_trt.load(output)


def test_tensorrt_needs_the_gpu_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open_library(RTX)
    monkeypatch.setitem(sys.modules, "tensorrt", real)
    tensorrt = open_backend("tensorrt")
    with pytest.raises(Unavailable, match=r"TensorRT runs on NVIDIA GPUs only; the device asked for is 'cpu'"):
        build("fashion", output=tmp_path / "x.bundle", backend="tensorrt")
    with pytest.raises(BadInput, match=r"TensorRT can't honour the option compute-capabilities=8.6: .*it compiles on"):
        tensorrt.build_arch("cpu", {"compute-capabilities": "8.6"})
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_missing_or_hollow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unavailable, match=r"'tensorrt' needs TensorRT 10.1 to 11, which can't be imported") as caught:
        open_backend("tensorrt")
    assert "tstitch-trt[tensorrt]" in caught.value.hint
    # The package of type stubs is a folder without code: it imports as an empty module.
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(Unavailable, match="tensorrt: it has no Builder"):
        open_backend("tensorrt")


# --- what TensorRT can be asked for (its options are checked here; compiling needs its libraries and a GPU)


def test_tensorrt_s_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = resolve(
        TENSORRT,
        open_library(RTX),
        {
            "workspace": 512,
            "optimisation-level": 5,
            "tiling": "full",
            "timing-cache": "times.bin",
            "hardware-compatible": "ampere+",
            "version-compatible": True,
            "refit": True,
            "strip-weights": True,
            "max-aux-streams": 2,
        },
        "cuda",
    )
    assert (chosen.workspace, chosen.optimisation_level, chosen.max_aux_streams) == (512, 5, 2)
    assert (chosen.tiling, chosen.hardware) == ("FULL", "AMPERE_PLUS")
    assert chosen.timing_cache == str(tmp_path / "times.bin")
    assert chosen.version_compatible
    assert chosen.refit
    assert chosen.strip_weights
    assert resolve(TENSORRT, open_library(RTX), {}, "cuda").max_aux_streams == 0
    monkeypatch.setattr(open_library(RTX), "__version__", "11.3.0.42")  # its REFIT may lose a bias
    with pytest.raises(BadInput, match=r"TensorRT 11.3.0.42 may drop the bias of a matrix product .* with refit") as e:
        resolve(TENSORRT, open_library(RTX), {"refit": True}, "cuda")
    assert "!=11.3" in e.value.hint
    assert resolve(TENSORRT, open_library(RTX), {"strip-weights": True}, "cuda").strip_weights
    monkeypatch.setattr(open_library(RTX), "__version__", "11.4.0.106")
    assert resolve(TENSORRT, open_library(RTX), {"refit": True}, "cuda").refit
    with pytest.raises(BadInput, match="optimisation-level is 6; allowed is a whole number from 0 to 5"):
        resolve(TENSORRT, open_library(RTX), {"optimisation-level": 6}, "cuda")
    with pytest.raises(BadInput, match=r"hardware-compatible.*'ampere'.*none, ampere\+, same"):
        resolve(TENSORRT, open_library(RTX), {"hardware-compatible": "ampere"}, "cuda")


@pytest.mark.parametrize(
    ("options", "version", "arch", "here", "runs"),
    [
        ({}, "10.13.3.9", "sm_90", "sm_90", False),  # another version
        ({"version-compatible": True}, "10.13.3.9", "sm_90", "sm_90", True),
        ({"version-compatible": True}, "99.0", "sm_90", "sm_90", False),  # newer than what is here
        ({"version-compatible": True}, "10.13.3.9", "sm_86", "sm_90", False),
        ({"version-compatible": True, "hardware-compatible": "ampere+"}, "10.13.3.9", "sm_86", "sm_90", True),
        ({"version-compatible": True, "hardware-compatible": "ampere+"}, "10.13.3.9", "sm_86", "sm_75", False),
    ],
)
def test_where_tensorrt_s_engines_run(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], version: str, arch: str, here: str, runs: bool
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", open_library(RTX))
    backend = cast(TensorRtBackend, open_backend("tensorrt"))
    monkeypatch.setattr(backend, "version", lambda: "10.16.1.11")
    monkeypatch.setattr(backend, "arch", lambda device: here)
    stored = identity(version, arch, **options)
    assert (backend.current_identity(stored, "cuda") == stored) == runs


@pytest.mark.parametrize(
    ("arch", "here", "runs"),
    [("rtx-default", "sm_89", True), ("sm_86,sm_89", "sm_89", True), ("sm_86,sm_89", "sm_120", False)],
)
def test_where_tensorrt_rtx_s_engines_run(
    rtx: TensorRtBackend, monkeypatch: pytest.MonkeyPatch, arch: str, here: str, runs: bool
) -> None:
    stored = identity(rtx.version(), arch)
    monkeypatch.setattr(rtx, "arch", lambda device: here)
    assert (rtx.current_identity(stored, "cuda") == stored) == runs
    old = msgspec.structs.replace(stored, backend_version=OTHER + "0")
    assert rtx.current_identity(old, "cuda") != old
