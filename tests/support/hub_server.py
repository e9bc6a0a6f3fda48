"""A Hugging Face hub on 127.0.0.1: a model's commit and files, and the files, as huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

__all__ = ["Hub", "running_hub"]

_LARGE = (".safetensors", ".bin")


@dataclass
class Hub:
    """``commits`` are files by repository and commit, ``branches`` commits by repository and branch.

    ``closed``: the status that a repository, its files or one file are refused with, and the code that tells why.
    ``asked``: what was asked for, files as ``ORG/NAME/FILE``. ``sends``: the pieces in which a file is sent.
    """

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    closed: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    sends: Callable[[bytes], Iterable[bytes]] = lambda content: (content,)

    def publish(self, repository: str, files: dict[str, bytes] | Path, branch: str = "main") -> str:
        """Makes these files, or those of a folder, what the branch is; returns the commit."""
        if isinstance(files, Path):
            paths = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        commit = hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def files_asked(self) -> list[str]:
        """The files that were downloaded, in order, without their repository's name."""
        return [name.split("/", 2)[2] for name in self.asked if name.count("/") > 1]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if info := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._model(info[1], info[2] or "main")
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*file.groups())
        else:
            self._answer(404)

    do_HEAD = do_GET  # noqa: N815

    def _model(self, repository: str, revision: str) -> None:
        self.hub.asked.append(repository)
        if repository in self.hub.closed and self.hub.closed[repository][1] != "GatedRepo":
            return self._refuse(*self.hub.closed[repository])
        if repository not in self.hub.commits:
            return self._refuse(404, "RepoNotFound")
        commit = self.hub.branches[repository].get(revision, revision)
        if commit not in self.hub.commits[repository]:
            return self._refuse(404, "RevisionNotFound")
        files = self.hub.commits[repository][commit]
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        return self._answer(200, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode())

    def _file(self, repository: str, commit: str, name: str) -> None:
        if self.command == "GET":
            self.hub.asked.append(f"{repository}/{name}")
        for closed in {repository, f"{repository}/{name}"} & self.hub.closed.keys():
            return self._refuse(*self.hub.closed[closed])
        commit = self.hub.branches.get(repository, {}).get(commit, commit)
        content = self.hub.commits.get(repository, {}).get(commit, {}).get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        large = hashlib.sha256(content).hexdigest()
        tag = large if name.endswith(_LARGE) else hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self._answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}, self.hub.sends)
        return None

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(
        self,
        status: int,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
        sends: Callable[[bytes], Iterable[bytes]] = lambda content: (content,),
    ) -> None:
        """A GET ends where the connection does, which is the way of HTTP/1.0."""
        self.send_response(status)
        length = {"Content-Length": str(len(content))} if self.command == "HEAD" else {}
        for name, value in {**(headers or {}), **length}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # of one who did not wait
            for part in sends(content) if self.command == "GET" else ():
                self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running_hub(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub that ``huggingface_hub`` asks in the block, with its local cache and ours in ``folder``."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    (folder / "disk").mkdir()
    (folder / "hf").symlink_to("disk", target_is_directory=True)  # as many have it
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("TSTITCH_TRT_CACHE", str(folder / "ours"))
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
