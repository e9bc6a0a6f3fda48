"""A bundle from a stranger decides nothing about what code runs: engines that may run code, and pickled objects."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tstitch_trt
from support.command import Command, refused
from support.tiny import TinyPair
from support.torch_engines import PROGRAM, put_engine, with_torch_engines
from tstitch_engines.backends import open_backend
from tstitch_engines.backends.onnxruntime import OnnxRuntimeBackend
from tstitch_engines.backends.torch_archive import check_archive
from tstitch_engines.bundle.built_here import note_built
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.cache import Cache
from tstitch_engines.child import DEFAULT
from tstitch_engines.compile.bundle import _compiler
from tstitch_engines.compile.load import require_trust
from tstitch_engines.errors import BadEngine, Unsafe, Untrusted
from tstitch_engines.spec import usual_batch

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def program(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A stranger's bundle with sound engines, and the archive that each of them is."""
    bundle = tmp_path_factory.mktemp("stranger") / "stranger.bundle"
    return bundle, with_torch_engines(tiny_pair.bundle, bundle)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def stranger(program: tuple[Path, bytes], tmp_path: Path) -> Path:
    shutil.copytree(program[0], tmp_path / "stranger.bundle")
    return tmp_path / "stranger.bundle"


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "sample": lambda bundle, folder: ["sample", bundle, "--steps", 1, "--labels", 1, "-o", folder / "a.png"],
    "bench": lambda bundle, folder: ["bench", bundle, "--fractions", "0", "--steps", 1, "--repeats", 1, "--batch", 1],
    "report": lambda bundle, folder: [
        *("report", bundle, "--fractions", "0", "--steps", 1, "--labels", 1, "-o", folder / "a.html")
    ],
    "calibrate": lambda bundle, folder: ["calibrate", bundle],
    "sample --rebuild": lambda bundle, folder: ["sample", bundle, "--rebuild", "-o", folder / "a.png"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_engines_of_unknown_origin_do_not_load(run: Command, stranger: Path, tmp_path: Path, command: str) -> None:
    put_engine(stranger, b"it is not even looked at")
    refused(
        run(*COMMANDS[command](stranger, tmp_path)),
        "the torch engine of member 'small'", "not compiled on this machine", "may run code", "--backend torch",
        "--trust",
    )  # fmt: skip


def test_verify_leaves_them_out(run: Command, stranger: Path) -> None:
    put_engine(stranger, b"it is not even looked at")
    for more in ([], ["--rebuild"]):
        outcome = run("verify", stranger, "--samples", 1, "--json", *more)
        assert {check["status"] for check in outcome.json["engines"]} == {"not checked"}
        assert "--trust" in outcome.json["engines"][0]["reason"]


def test_they_load_where_the_caller_says_so(stranger: Path) -> None:
    with pytest.raises(Untrusted) as caught:
        tstitch_trt.load(stranger, threads=1)
    assert (caught.value.exit_code, isinstance(caught.value, tstitch_trt.BadBundle)) == (2, True)
    for wish in ({"trust": True}, {"backend": "torch"}):
        tstitch_trt.load(stranger, threads=1, verify="size", **wish).close()  # type: ignore[arg-type]


def test_they_load_where_they_were_compiled(stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    for member in open_bundle(stranger).manifest.members.values():
        note_built(member.engines[0].files)
    tstitch_trt.load(stranger, threads=1).close()
    file = stranger / "small" / PROGRAM
    file.write_bytes(file.read_bytes()[:-1] + b"\1")  # the hash in the manifest is that of an engine made here
    with pytest.raises(tstitch_trt.BadBundle, match="is altered"):
        tstitch_trt.load(stranger, threads=1, verify="size")


def test_a_hash_is_no_path(stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "built").mkdir(parents=True)
    (tmp_path / "mark").touch()
    manifest = stranger / "manifest.json"
    parts = [part for member in open_bundle(stranger).manifest.members.values() for part in member.engines[0].files]
    manifest.write_text(manifest.read_text().replace(parts[0].sha256, "../../../mark"))
    with pytest.raises(tstitch_trt.BadBundle):
        tstitch_trt.load(stranger, threads=1, verify="size")


def test_which_backends_have_engines_that_may_run_code(stranger: Path) -> None:
    assert not OnnxRuntimeBackend.runs_code
    opened = open_bundle(stranger)
    record = opened.manifest.members["small"].engines[0]
    require_trust(opened, "small", record, OnnxRuntimeBackend(), trusted=False)
    for name in ("tensorrt-rtx", "torch"):
        with pytest.raises(Untrusted, match=f"the {name} engine of member 'small'") as caught:
            require_trust(opened, "small", record, open_backend(name), trusted=False)
        assert ("--rebuild" in caught.value.hint) == (name == "tensorrt-rtx")
        require_trust(opened, "small", record, open_backend(name), trusted=True)


def test_a_manifest_names_no_file_that_a_compilation_writes(tiny_pair: TinyPair, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    opened = open_bundle(tiny_pair.bundle)
    small = opened.manifest.members["small"]
    options = {"timing-cache": str(victim), "compute-capabilities": "8.9"}
    identity = msgspec.structs.replace(small.engines[0].identity, backend="tensorrt-rtx", options=options)
    engines = (msgspec.structs.replace(small.engines[0], identity=identity),)
    network = msgspec.structs.replace(small, engines=engines)
    made = _compiler(
        open_backend("tensorrt-rtx"), network, "cpu", {}, None, {}, Cache(), DEFAULT, usual_batch(guided=True)
    )
    assert made.settings == {"compute-capabilities": "8.9"}


# --- pickled objects, which no trust lets pass


class Writes:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled(path: Path, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save((Writes(path),), buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def rewritten(archive: bytes, changes: dict[str, bytes | None], *, folder: str = "archive/") -> bytes:
    """The archive with members replaced, added or (``None``) removed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()} | changes
        for name, content in members.items():
            if content is not None:
                new.writestr(f"{folder}{name}", content)
    return out.getvalue()


def member(archive: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(f"archive/{name}")


WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"


def constant(path: str) -> bytes:
    entry = {"path_name": path, "is_param": False, "use_pickle": True, "tensor_meta": None}
    return json.dumps({"config": {"c": entry}}).encode()


def sample_inputs(archive: bytes, path: Path) -> bytes:
    return rewritten(archive, {"data/sample_inputs/model.pt": pickled(path)})


def legacy_sample_inputs(archive: bytes, path: Path) -> bytes:
    return rewritten(archive, {"data/sample_inputs/model.pt": pickled(path, legacy=True)})


def pickled_weight(archive: bytes, path: Path) -> bytes:
    config = member(archive, WEIGHTS).replace(b'"use_pickle": false', b'"use_pickle": true')
    return rewritten(archive, {WEIGHTS: config, "data/weights/weight_0": pickled(path)})


def pickled_weight_by_a_word(archive: bytes, path: Path) -> bytes:
    config = member(archive, WEIGHTS).replace(b'"use_pickle": false', b'"use_pickle": "no"')
    return rewritten(archive, {WEIGHTS: config, "data/weights/weight_0": pickled(path)})


def all_weights(archive: bytes, path: Path) -> bytes:
    return rewritten(archive, {"data/weights/model.pt": pickled(path)})


def all_constants(archive: bytes, path: Path) -> bytes:
    return rewritten(archive, {"data/constants/model.pt": pickled(path)})


def opaque_object(archive: bytes, path: Path) -> bytes:
    import pickle

    return rewritten(
        archive, {CONSTANTS: constant("opaque_obj_0"), "data/constants/opaque_obj_0": pickle.dumps(Writes(path))}
    )


def older_layout(archive: bytes, path: Path, tensors: bytes = b"") -> bytes:
    """That of PyTorch 2.7, which later ones go on reading."""
    old = dict.fromkeys(zipfile.ZipFile(io.BytesIO(archive)).namelist())
    names = {name.partition("/")[2]: None for name in old}
    torch_version = ".".join(map(str, __import__("torch._export.serde.schema", fromlist=["x"]).SCHEMA_VERSION))
    return rewritten(
        archive,
        {
            **names,
            "version": torch_version.encode(),
            "serialized_exported_program.json": member(archive, "models/model.json"),
            "serialized_state_dict.pt": tensors or pickled(path),
            "serialized_constants.pt": tensors or pickled(path),
            "serialized_example_inputs.pt": tensors or pickled(path),
        },
        folder="",
    )


def test_archives_of_older_versions_pass(program: tuple[Path, bytes], tmp_path: Path) -> None:
    """The layouts of PyTorch 2.8 and 2.7: tensors as restricted pickles."""
    tensors = io.BytesIO()
    torch.save(({"weight": torch.ones(1)}, torch.zeros(2, 3)), tensors)
    stored = tensors.getvalue()
    later = {"data/weights/model.pt": stored, "data/constants/model.pt": stored, WEIGHTS: None, CONSTANTS: None}
    for content in (
        rewritten(program[1], later),
        older_layout(program[1], tmp_path / "mark", tensors=stored),
        rewritten(program[1], {"data/sample_inputs/model.pt": b""}),
    ):
        (tmp_path / "a.pt2").write_bytes(content)
        check_archive(torch, tmp_path / "a.pt2")


def library(archive: bytes, path: Path) -> bytes:
    return rewritten(archive, {"data/aotinductor/model/wrapper.so": b"\x7fELF"})


def another_case(archive: bytes, path: Path) -> bytes:
    return rewritten(archive, {"Data/Sample_Inputs/Model.PT": pickled(path)})


def another_program(archive: bytes, path: Path) -> bytes:
    return rewritten(archive, {"models/other.json": b"{}"})


def object_of_pytorch(archive: bytes, path: Path) -> bytes:
    return rewritten(archive, {CONSTANTS: constant("custom_obj_0"), "data/constants/custom_obj_0": b"anything"})


RUNS = (sample_inputs, legacy_sample_inputs, pickled_weight, pickled_weight_by_a_word, all_weights, all_constants,
        opaque_object, older_layout)  # fmt: skip


@pytest.mark.parametrize("attack", [*RUNS, library, another_case, another_program, object_of_pytorch])
def test_pickled_objects_and_libraries_are_refused(
    program: tuple[Path, bytes], tmp_path: Path, attack: Callable[[bytes, Path], bytes]
) -> None:
    archive, mark = tmp_path / "a.pt2", tmp_path / "mark"
    archive.write_bytes(attack(program[1], mark))
    with pytest.raises(Unsafe, match="is refused") as caught:
        check_archive(torch, archive)
    assert "do not trust" in caught.value.hint
    assert not mark.exists()


def test_the_attack_is_one(program: tuple[Path, bytes], tmp_path: Path) -> None:
    """PyTorch alone runs it."""
    ran = []
    for attack in RUNS:
        archive, mark = tmp_path / f"{attack.__name__}.pt2", tmp_path / attack.__name__
        archive.write_bytes(attack(program[1], mark))
        with suppress(Exception):  # what it says after it has run the code
            torch.export.load(archive)
        ran += [attack.__name__] * mark.exists()
    assert set(ran) >= {"sample_inputs", "pickled_weight"}


@pytest.mark.parametrize("command", ["sample", "bench", "report"])
def test_naming_the_backend_lets_no_pickle_pass(
    run: Command, program: tuple[Path, bytes], stranger: Path, tmp_path: Path, command: str
) -> None:
    mark = tmp_path / "mark"
    put_engine(stranger, sample_inputs(program[1], mark))
    for wish in (["--backend", "torch"], ["--trust"]):
        refused(
            run(*COMMANDS[command](stranger, tmp_path), *wish), "data/sample_inputs/model.pt holds more than tensors"
        )
    assert not mark.exists()


def test_verify_calls_it_failed(run: Command, program: tuple[Path, bytes], stranger: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    put_engine(stranger, sample_inputs(program[1], mark))
    outcome = run("verify", stranger, "--backend", "torch", "--samples", 1, "--json")
    assert outcome.code == 1
    assert {check["status"] for check in outcome.json["engines"]} == {"failed"}
    assert "holds more than tensors" in outcome.json["engines"][0]["reason"]
    assert not mark.exists()


# --- archives that readers of zip files may read in two ways


def two_tables(archive: bytes, path: Path) -> bytes:
    return sample_inputs(archive, path) + archive


def a_comment(archive: bytes, path: Path) -> bytes:
    other = sample_inputs(archive, path)
    return archive[:-2] + struct.pack("<H", len(other)) + other


def one_name_twice(archive: bytes, path: Path) -> bytes:
    out = io.BytesIO(rewritten(archive, {}))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(out, "a") as more:
        more.writestr("archive/data/sample_inputs/model.pt", pickled(path))
    return out.getvalue()


def compressed(archive: bytes, path: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def another_name_inside(archive: bytes, path: Path) -> bytes:
    table = archive.rindex(b"archive/byteorder")
    return archive[:table].replace(b"archive/byteorder", b"archive/byteordeR") + archive[table:]


def many_members(archive: bytes, path: Path) -> bytes:
    return archive[:-14] + struct.pack("<2H", 9, 9) + archive[-10:]


@pytest.mark.parametrize(
    "attack", [two_tables, a_comment, one_name_twice, compressed, another_name_inside, many_members]
)
def test_ambiguous_archives_are_refused(
    program: tuple[Path, bytes], tmp_path: Path, attack: Callable[[bytes, Path], bytes]
) -> None:
    archive = tmp_path / "a.pt2"
    archive.write_bytes(attack(program[1], tmp_path / "mark"))
    with pytest.raises(BadEngine):
        check_archive(torch, archive)
    assert not (tmp_path / "mark").exists()


def test_every_cut_is_damage(program: tuple[Path, bytes], tmp_path: Path) -> None:
    whole, archive = program[1], tmp_path / "a.pt2"
    for size in [0, 1, 21, 22, 100, *range(len(whole) - 120, len(whole))]:
        archive.write_bytes(whole[:size])
        with pytest.raises(BadEngine, match="can't load the engine"):
            check_archive(torch, archive)
