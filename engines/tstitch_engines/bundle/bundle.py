"""Bundles on disk: opened with every path, size and hash checked; replaced in one step or not at all."""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Literal, NoReturn

import msgspec

from tstitch_engines.bundle.consistency import check_manifest
from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.files import (
    exchange,
    hash_file,
    remove_stale,
    sync,
    temporary_directory,
    write_durably,
)
from tstitch_engines.bundle.manifest import SCHEMA, Component, Manifest, Member, Network, Origin, siblings
from tstitch_engines.bundle.onnx_files import NotOnnx, check_onnx
from tstitch_engines.bundle.read import MANIFEST_BYTES, decode_json, read_bounded
from tstitch_engines.bundle.signature import check_signature
from tstitch_engines.checks import check_path
from tstitch_engines.errors import BadBundle, BadInput, BuildFailed

__all__ = [
    "MANIFEST",
    "STUDIES",
    "Bundle",
    "check_bundle",
    "is_bundle",
    "open_bundle",
    "rebuild_command",
    "require_vouched",
    "write_bundle",
]

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STUDIES = "studies"
"""Folder of the bundle's studies (``tstitch_trt.study``): survives a rebuild, is not in the manifest."""


class Bundle:
    """An opened bundle: its manifest is well formed and every file of it was there when it was opened.

    ``hashed``: every file had the hash that the manifest states. ``vouched``: it had a signature that was required.
    ``content``: the bytes that ``manifest`` was read from.
    """

    def __init__(
        self, root: Path, manifest: Manifest, *, hashed: bool = False, vouched: bool = False, content: bytes = b""
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.content = content
        self.hashed = hashed
        self.vouched = vouched

    def path(self, component: Component) -> Path:
        """Where a component lies. Raises ``BadBundle`` when that is outside the bundle."""
        return _inside(self.root, component, self.rebuild_command)

    @property
    def rebuild_command(self) -> str:
        """The command that makes it again from its recipe."""
        return rebuild_command(self.manifest, self.root)

    def check_files(self, components: Iterable[Component], *, full: bool = True) -> None:
        """Raises ``BadBundle`` for a file that is missing, truncated or (``full``) altered."""
        for component in components:
            _check(component, self.path(component), self.rebuild_command, full=full)


def rebuild_command(manifest: Manifest | None, root: Path) -> str:
    """The command that makes the bundle again, as far as the manifest knows it."""
    words = ["tstitch-trt", "build", manifest.recipe if manifest else "RECIPE"]
    if manifest is not None:
        for name, member in manifest.members.items():
            if member.sources and not member.sources[0].shipped:
                words += ["--member", f"{name}={_given(member)}"]
        checkpoints = {_given(member) for member in manifest.members.values()}
        for name, part in manifest.parts.items():
            if (given := _given(part)) and given not in checkpoints:  # else it is found in that pipeline again
                words += ["--part", f"{name}={given}"]
        for name, network in manifest.networks().items():
            made = network.quantisation if isinstance(network, Member) else None
            precision = made.source_precision if made else network.precision
            if precision != "fp32":
                words += ["--precision", f"{name}={precision}"]
    quantised = {n: m for n, m in manifest.members.items() if m.quantisation is not None} if manifest else {}
    if not quantised:
        return shlex.join((*words, "-o", str(root)))
    place = f"{root}.source"
    commands = [shlex.join((*words, "-o", place))]
    for index, (name, member) in enumerate(quantised.items()):
        target = f"{root}.new" if index == len(quantised) - 1 else f"{root}.{name}"
        commands.append(shlex.join(_quantise_words(place, name, member, target)))
        place = target
    return " && ".join(commands)


def _given(network: Network) -> str:
    """The last part of the path that was given at build time: a folder's files are ``FOLDER/FILE``.

    A file of Hugging Face is given as its repository and commit.
    """
    if not network.sources:
        return ""
    origin = network.sources[-1].origin  # of the weights, which are the last
    return str(origin) if isinstance(origin, Origin) else network.sources[0].name.partition("/")[0]


def _quantise_words(source: str, name: str, member: Member, target: str) -> list[str]:
    made = member.quantisation
    assert made is not None
    words = ["tstitch-trt", "quantise", source, "--member", name, "--mode", member.precision]
    words += ["--samples", str(made.rows), "--seed", str(made.seed), "--steps", str(made.steps)]
    words += ["--solver", made.solver, "--guidance", f"{made.guidance:g}", "--calibration", made.method]
    words += ["--high-precision", made.high_precision]
    for schedule in made.schedules:
        words += ["--schedule", schedule]
    for layer in made.kept:
        words += ["--keep", layer]
    return [*words, "-o", target]


def is_bundle(path: Path) -> bool:
    """Whether ``path`` looks like a bundle at all; ``open_bundle`` says whether it is a sound one."""
    return (path / MANIFEST).is_file()


def check_bundle(value: object, what: str) -> Path | Bundle:
    """A bundle that is open, or the path of one."""
    return value if isinstance(value, Bundle) else check_path(value, what)


def open_bundle(
    path: str | Path,
    verify: Literal["full", "size"] = "full",
    *,
    engines: bool = True,
    require_signature: str | Path | None = None,
) -> Bundle:
    """The bundle at ``path``.

    ``verify="size"`` checks that every file is there with its recorded size, ``"full"`` also its sha256;
    ``engines=False`` leaves out the files of engines, for callers that compile them again. ``require_signature``: the
    file of a public key with which the manifest must be signed (``bundle.signature``); it is checked before anything
    else is read. Raises ``BadBundle`` naming the fault and the command that rebuilds the bundle, ``Untrusted`` for the
    signature, ``Unsafe`` for a graph that reads files it does not list.
    """
    root = Path(path)
    if require_signature is not None and verify != "full":
        raise BadInput(
            f"verify = {verify!r} with a signature that is required: what is signed are hashes, which are not compared",
            hint='verify="full", or leave require_signature out',
        )
    content = _manifest_bytes(root)
    if require_signature is not None:
        check_signature(root, content, Path(require_signature))
    manifest = _decode_manifest(root, content)
    rebuild = rebuild_command(manifest, root)
    made = manifest.engine_paths()
    for component in manifest.components():
        path = _inside(root, component, rebuild)
        if engines or component.path not in made:
            again = f"{rebuild}; its engines alone: sample, bench and verify with --rebuild"
            _check(component, path, again if component.path in made else rebuild, full=verify == "full")
    for network in manifest.networks().values():
        if network.onnx:
            try:
                check_onnx(root / network.onnx[0].path, siblings(network.onnx))
            except NotOnnx as error:
                raise BadBundle(str(error), hint=f"build it again: {rebuild}") from None
    signed, hashed = require_signature is not None, engines and verify == "full"
    return Bundle(root, manifest, hashed=hashed, vouched=signed, content=content)


def require_vouched(bundle: Bundle, require_signature: str | Path | None) -> Bundle:
    """``bundle``; raises ``BadInput`` where it was opened without the signature that is now required."""
    if require_signature is not None and not bundle.vouched:
        raise BadInput(
            f"the signature of {bundle.root} is required of an opened bundle, whose manifest was not checked",
            hint="give the path, or open it with open_bundle(path, require_signature=KEY)",
        )
    return bundle


def _manifest_bytes(root: Path) -> bytes:
    rebuild = f"build it: {rebuild_command(None, root)}"
    if not root.exists():
        raise BadBundle(f"{root} does not exist; wanted is the directory of a bundle", hint=rebuild)
    if not root.is_dir():
        raise BadBundle(f"{root} is a file; a bundle is a directory with a {MANIFEST}", hint="give the directory")
    file = root / MANIFEST
    try:
        return read_bounded(file, MANIFEST_BYTES)
    except FileNotFoundError:
        parts = sorted(entry.name for entry in root.iterdir())[:4]
        raise BadBundle(
            f"{root} is no bundle: it has no {MANIFEST}, only {', '.join(parts) or 'nothing'} "
            "(a foreign directory, or a copy that was cut short)",
            hint=f"give the directory of a bundle, or {rebuild}",
        ) from None
    except (OSError, DecodeError) as error:
        raise BadBundle(f"{file} is damaged: {error}", hint=rebuild) from None


def _decode_manifest(root: Path, content: bytes) -> Manifest:
    rebuild, file = f"build it: {rebuild_command(None, root)}", root / MANIFEST
    try:
        data = decode_json(content)
    except DecodeError as error:
        raise BadBundle(f"{file} is damaged: {error}", hint=rebuild) from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, bool) or not isinstance(schema, int):
        raise BadBundle(f"{file} is not the manifest of a bundle: it states no schema version", hint=rebuild)
    if schema != SCHEMA:
        fix = "a newer tstitch-trt made it: upgrade with pip install -U tstitch-trt, or " if schema > SCHEMA else ""
        raise BadBundle(f"{file} has schema version {schema}; this version reads {SCHEMA}", hint=fix + rebuild)
    try:
        manifest = convert(data, Manifest, word="field")
        check_manifest(manifest)
    except DecodeError as error:
        fix = f"{error.fix}; or {rebuild}" if error.fix else rebuild
        raise BadBundle(f"{file}: {error.message}", hint=fix) from None
    return manifest


def _inside(root: Path, component: Component, rebuild: str) -> Path:
    """The component's path, proved to lie in the bundle. A file of a bundle may never name one outside of it."""
    name = PurePosixPath(component.path)
    problem = None
    if not component.path or name.is_absolute() or "\\" in component.path or "\0" in component.path:
        problem = "is not a relative path"
    elif ".." in name.parts:
        problem = "climbs out of the bundle"
    elif not (root / name).resolve().is_relative_to(root.resolve()):
        problem = "leads out of the bundle through a symbolic link"
    if problem:
        raise BadBundle(
            f"{root / MANIFEST}: component path {component.path!r} {problem}; allowed are paths inside the bundle",
            hint=f"do not trust this bundle; build it again: {rebuild}",
        )
    return root / name


def _check(component: Component, path: Path, rebuild: str, *, full: bool) -> None:
    fix = f"build it again: {rebuild}"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadBundle(f"{path} is missing from the bundle ({error.strerror})", hint=fix) from None
    if not path.is_file():
        raise BadBundle(f"{path} is not a regular file", hint=fix)
    if size != component.bytes:
        raise BadBundle(f"{path} has {size} bytes, the manifest says {component.bytes}: truncated or altered", hint=fix)
    if full and (found := hash_file(path)[0]) != component.sha256:
        raise BadBundle(f"{path} is altered: its sha256 is {found}, the manifest says {component.sha256}", hint=fix)


def write_bundle(output: Path, fill: Callable[[Path], Manifest]) -> Bundle:
    """Makes the bundle ``output``: ``fill`` puts the files into an empty directory and returns the manifest.

    That directory is a sibling of ``output`` and takes its place in one rename at the end, so ``output`` is always
    either the old bundle or the new one. On any exception, Ctrl-C or SIGTERM it is removed; the next build removes
    what a killed process left. Raises ``BadBundle`` when ``output`` holds something else, ``BuildFailed`` when the
    files can't be written.
    """
    output = output.resolve()
    _refuse_foreign(output)
    prefix, backup = f".{output.name}.building-", output.parent / f".{output.name}.replaced"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _restore(output, backup)
        remove_stale(output.parent, prefix)
        with _terminate_as_exception(), temporary_directory(output.parent, prefix) as staging:
            manifest = fill(staging)
            if stat.S_ISDIR(_mode(output / STUDIES)):
                shutil.copytree(output / STUDIES, staging / STUDIES, ignore=_not_plain)
            write_durably(staging / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
            _read_back(staging, output)
            for directory in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
                sync(directory)
            _replace(staging, output, backup)
    except OSError as error:
        raise BuildFailed(
            f"writing the bundle {output} failed: {error}",
            hint="free space there and in the cache (TSTITCH_TRT_CACHE=DIR moves it), or choose another place with "
            "-o DIR; what was there before is unchanged",
        ) from error
    return Bundle(output, manifest)


def _mode(path: Path) -> int:
    """Of the entry itself, be it a link; 0 where there is none."""
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def _not_plain(folder: str, names: list[str]) -> list[str]:
    """Links, pipes and devices: what they lead to is no part of the bundle, and may have no end."""
    modes = {name: _mode(Path(folder, name)) for name in names}
    return [name for name, mode in modes.items() if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))]


def _read_back(staging: Path, output: Path) -> None:
    """Opens what was written, as whoever gets it will. Raises ``BuildFailed``: ``output`` is still the old bundle."""
    try:
        open_bundle(staging, "size")
    except BadBundle as error:
        raise BuildFailed(
            f"the bundle made for {output} can't be opened and was not put there: {error.message}",
            hint="change the recipe, option or checkpoint that this value is from; what was there before is unchanged",
        ) from error


def _refuse_foreign(output: Path) -> None:
    if output.is_dir() and not is_bundle(output) and any(output.iterdir()):
        problem = f"{output} is not empty and holds no {MANIFEST}, so it is no bundle"
    elif output.exists() and not output.is_dir():
        problem = f"{output} is a file"
    else:
        return
    raise BadBundle(f"{problem}; a build replaces bundles only", hint="choose another directory with -o DIR")


def _replace(staging: Path, output: Path, backup: Path) -> None:
    """Puts ``staging`` where ``output`` is; afterwards ``staging`` is gone or holds the old bundle."""
    if not output.exists():
        staging.rename(output)
    elif not exchange(staging, output):
        # Without an atomic exchange there is a moment with no bundle: `_restore` mends a crash in it.
        output.rename(backup)
        try:
            staging.rename(output)
        except BaseException:
            backup.rename(output)
            raise
        backup.rename(staging)  # removed together with the temporary directory
    sync(output.parent)


def _restore(output: Path, backup: Path) -> None:
    if not is_bundle(backup):
        return
    if not output.exists():
        _log.warning("restoring %s, set aside by a build that was killed", output)
        backup.rename(output)
    else:
        backup.rename(Path(f"{output.parent / f'.{output.name}.building-old'}"))  # complete but replaced: now stale


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """Turns SIGTERM into ``SystemExit``, so that it unwinds as Ctrl-C does, unless the program handles it itself."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one must not end the tidying up
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
