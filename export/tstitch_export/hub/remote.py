"""Everything that is asked of ``huggingface_hub``: a revision's commit and files, downloads, and its local cache.

Its own settings hold: ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_ENDPOINT``. A repository is
asked once and waited for ``HF_HUB_ETAG_TIMEOUT`` seconds, 5 where nothing is said: without a network that is the end.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

from tstitch_engines.bundle.files import replace_file
from tstitch_engines.errors import BadCheckpoint, BadInput, FailedWork, first_line
from tstitch_engines.needs import require
from tstitch_export.hub.reference import Reference, is_commit

__all__ = [
    "Listing",
    "Unreachable",
    "ask",
    "cache_folder",
    "cached_commit",
    "check_name",
    "download",
    "remember",
    "snapshot_folder",
]

T = TypeVar("T")

_SECONDS: Final = 5
_TICK: Final = 0.2  # seconds between two reports of a download
_TIDYING: Final = 2.0  # seconds that a download which is stopped has to remove its file
_HTTP: Final = ("httpx", "httpx2", "requests", "urllib3")  # one of them is what huggingface_hub speaks through
_LONGEST: Final = 400  # characters of a file's name
_DRIVE: Final = re.compile(r"[A-Za-z]:")


class Unreachable(Exception):
    """Nobody answers, or nobody may be asked; the message says why."""


@dataclass(frozen=True)
class Listing:
    """A ``commit`` and its files: names and bytes."""

    commit: str
    sizes: dict[str, int]


def _hub(reference: Reference) -> Any:
    what = f"{reference.repository} is no file or folder here, and as a Hugging Face repository it"
    hub = require("huggingface_hub", what, instead="give the path of a local copy")
    for module in ("constants", "errors", "utils"):  # attributes of it once they are imported
        import_module(f"huggingface_hub.{module}")
    return hub


def check_name(reference: Reference) -> None:
    """Raises ``BadInput`` unless the repository may be called so, ``Unavailable`` without ``huggingface_hub``."""
    hub = _hub(reference)
    try:
        hub.utils.validate_repo_id(reference.repository)
    except hub.errors.HFValidationError as error:
        raise BadInput(
            f"{reference.repository!r} is no repository's name: {first_line(error)}", hint="write ORG/NAME"
        ) from None


def cache_folder(reference: Reference) -> Path:
    """The folder of all of this machine's copies. Raises ``Unavailable`` without ``huggingface_hub``."""
    return Path(_hub(reference).constants.HF_HUB_CACHE)


def snapshot_folder(reference: Reference, commit: str) -> Path:
    """Where the files of a commit are, whether they are there or not."""
    return _repository_folder(reference) / "snapshots" / commit


def cached_commit(reference: Reference) -> str | None:
    """What a branch or tag was when it was last asked for; ``None`` where it never was."""
    try:
        commit = (_repository_folder(reference) / "refs" / reference.revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if is_commit(commit) else None


def remember(reference: Reference, commit: str) -> None:
    """Notes what a branch or tag is, for when there is no network."""
    if cached_commit(reference) == commit:
        return
    with suppress(OSError):  # a cache that may only be read
        replace_file(_repository_folder(reference) / "refs" / reference.revision, commit.encode())


def ask(reference: Reference) -> Listing:
    """The commit of a revision and its files.

    Raises ``Unreachable`` without a network, ``BadInput`` for what does not exist or may not be read.
    """
    hub = _hub(reference)
    if hub.constants.HF_HUB_OFFLINE:
        raise Unreachable("HF_HUB_OFFLINE is set")
    seconds = int(hub.constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else _SECONDS
    api = hub.HfApi(library_name="tstitch-trt")
    info = _in_thread(
        lambda: api.model_info(reference.repository, revision=reference.revision, files_metadata=True, timeout=seconds),
        reference,
        seconds=2 * seconds,  # names of hosts are looked up without a limit
    )
    files = {str(file.rfilename): int(file.size or 0) for file in info.siblings or ()}
    commit = str(info.sha)
    if not is_commit(commit):
        raise BadInput(
            f"{reference}: {_endpoint(hub)} says its commit is {commit[:80]!r}; a commit is 40 hex digits",
            hint="check HF_ENDPOINT",
        )
    if is_commit(reference.revision) and commit != reference.revision:
        raise BadInput(f"{reference}: {_endpoint(hub)} answers with commit {commit}", hint="check HF_ENDPOINT")
    return Listing(commit, {name: size for name, size in files.items() if _stays_inside(name)})


def download(reference: Reference, commit: str, name: str, tick: Callable[[int], None]) -> None:
    """Puts one file of a commit into the local cache; ``tick`` gets the bytes that are there so far.

    An exception of ``tick`` or Ctrl-C stops it, and ``huggingface_hub`` tidies up. Raises ``BadInput`` where it may not
    be read, ``Unreachable`` where the connection is lost, ``FailedWork`` where it can't be written.
    """
    hub, blobs, started = _hub(reference), _repository_folder(reference) / "blobs", time.time()
    at_commit = Reference(reference.repository, name, commit)

    def written() -> int:
        try:
            found = [file.stat() for file in blobs.glob("*.incomplete")]
        except OSError:  # just renamed
            return 0
        return max((one.st_size for one in found if one.st_mtime >= started), default=0)  # others were left behind

    quiet = hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()  # what they draw and our bar are on one terminal
    try:
        found = _in_thread(
            lambda: hub.hf_hub_download(reference.repository, name, revision=commit, library_name="tstitch-trt"),
            at_commit,
            tick=lambda: tick(written()),
        )
    finally:
        if not quiet:
            hub.utils.enable_progress_bars()
    if not (snapshot_folder(reference, commit) / name).is_file():
        raise BadCheckpoint(f"{at_commit} was put into {found}", hint="remove that folder and build again")


def _repository_folder(reference: Reference) -> Path:
    return cache_folder(reference) / f"models--{reference.repository.replace('/', '--')}"


def _stays_inside(name: str) -> bool:
    """Whether a file's name in a repository is one below its folder on any system."""
    path = PurePosixPath(name)
    return (
        name == str(path)
        and not path.is_absolute()
        and ".." not in path.parts
        and name.isprintable()
        and "\\" not in name
        and not _DRIVE.match(name)
        and len(name) <= _LONGEST
    )


def _in_thread(
    work: Callable[[], T], about: Reference, *, seconds: float | None = None, tick: Callable[[], None] | None = None
) -> T:
    """``work()``, in a thread that is left behind after ``seconds``, and stopped at Ctrl-C.

    Raises what ``tick`` does, and what an exception of the work ``about`` a repository means.
    """
    hub = _hub(about)
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="tstitch-hub", daemon=True)
    thread.start()
    waited = 0.0
    try:
        while thread.is_alive() and (seconds is None or waited < seconds):
            thread.join(_TICK)
            waited += _TICK
            if tick is not None:
                tick()
    except BaseException:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        thread.join(_TIDYING)
        raise
    if failed:
        raise _meaning(hub, failed[0], about) from None
    if not done:
        raise Unreachable(f"{_endpoint(hub)} can't be reached: there was no answer in {seconds:g} seconds")
    return done[0]


def _endpoint(hub: Any) -> str:
    """The address that is asked, without the name and password that may be in it."""
    return re.sub(r"//[^/@]*@", "//", hub.constants.ENDPOINT)


def _meaning(hub: Any, error: BaseException, reference: Reference) -> Exception:
    """What an exception of ``huggingface_hub``, of its HTTP library or of the disk means here."""
    errors, endpoint = hub.errors, _endpoint(hub)
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # why the file was not found
    place = f"{endpoint}/{reference.repository}"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    told = str(getattr(response, "headers", {}).get("X-Error-Message") or "")[:_LONGEST]
    told = "".join(filter(str.isprintable, told))
    if status == 401 and told.startswith("Invalid credentials"):
        return BadInput(f"{endpoint} does not accept the access token (401)", hint="hf auth login, or correct HF_TOKEN")
    if isinstance(error, errors.GatedRepoError) or (
        status in (401, 403) and not isinstance(error, errors.RepositoryNotFoundError)
    ):
        return BadInput(
            f"{reference} may be read by those alone to whom its owner gave access ({status})",
            hint=f"ask for it at {place}, then hf auth login, or set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return BadInput(
            f"{reference}: there is no file or folder of this name here, and Hugging Face has no model "
            f"{reference.repository}, or a private one ({status})",
            hint=f"check the spelling ({place}), or give a path; for a private one hf auth login, or set HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BadInput(
            f"{reference.repository} has no branch, tag or commit {reference.revision!r}",
            hint=f"see {place}/commits/main, or leave out @{reference.revision}",
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return BadInput(f"{reference.repository} has no file {reference}", hint=f"see {place}/tree/main")
    if status is not None:
        problem = f"{endpoint} answers {status}{told and ': '}{told}"
        if status >= 500 or status in (408, 429):  # these pass
            return Unreachable(problem)
        return BadInput(f"{reference}: {problem}", hint="check HF_ENDPOINT, or give the path of a local copy")
    if isinstance(error, UnicodeEncodeError):
        return BadInput("the access token of Hugging Face is not ASCII", hint="hf auth login, or correct HF_TOKEN")
    own = type(error).__module__ == "builtins"
    if own and isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError) and error.errno:
        return FailedWork(
            f"{reference}: {cache_folder(reference)} can't be used: {error}",
            hint="make room, or name another folder: HF_HOME=DIR",
        )
    lost = isinstance(error, OSError) and type(error) is not OSError
    if lost or type(error).__module__.startswith(_HTTP):
        return Unreachable(f"{endpoint} can't be reached: {first_line(error)}")
    return Unreachable(f"what {endpoint} answers can't be read ({type(error).__name__}: {first_line(error)})")
