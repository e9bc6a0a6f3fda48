"""Many images in shards of equal size. What a shard holds depends on the request alone, not on who draws it or when.

``Bulk`` is the request and draws shards; ``Run`` keeps what is finished, so that a run that was ended goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal, Self, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.bundle.read import decode_json, read_bounded
from tstitch_engines.errors import BadInput, Busy, NotFinite
from tstitch_trt.files import HALF_WRITTEN, load_array, write_bytes
from tstitch_trt.images.write import join_npz, picture_file, png_name
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.request.options import SampleKeywords, SampleOptions
from tstitch_trt.request.parse import count_images
from tstitch_trt.runtime.result import FailedImage, Result
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.runtime.vae import Tile

__all__ = ["JOURNAL", "Bulk", "Describe", "DrawnShard", "Run"]

JOURNAL: Final = "run.jsonl"
_JOURNAL_BYTES: Final = 64 << 20  # 100,000 shards of one image, all of them failed
_EMBEDDINGS: Final = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
)  # fmt: skip

Describe = Callable[[Manifest, Result], tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
"""The settings of a result as they are kept in picture files: those of all its images, and each image's own."""


class DrawnShard(msgspec.Struct, frozen=True):
    """The files of shard ``index`` by name, and its images that were not drawn."""

    index: int
    files: tuple[tuple[str, bytes], ...]
    failed: tuple[FailedImage, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Bulk:
    """A request of ``images`` images that is drawn ``shard`` images at a time. Pickled, it goes to other machines.

    ``seeds``: one per image, and so are ``labels`` of a class bundle. ``keywords``: all else of the request; texts and
    embeddings go round. ``kind``: a shard is one PNG file per image, or one ``.npy`` of uint8 ``[N,H,W,C]``.
    ``open_runtime`` loads the bundle, ``loras`` are put into it. ``bundle``: the digest that it must have.
    """

    open_runtime: Callable[[], Runtime]
    describe: Describe
    bundle: str
    seeds: tuple[int, ...]
    labels: tuple[int, ...]
    keywords: SampleKeywords
    shard: int
    kind: Literal["folder", "npz"]
    tile: Tile = "auto"
    partial: bool = False
    loras: Mapping[str, str]

    @staticmethod
    def of(
        manifest: Manifest, keywords: SampleKeywords, *, open_runtime: Callable[[], Runtime], describe: Describe,
        shard: int, kind: Literal["folder", "npz"], tile: Tile, partial: bool, loras: Mapping[str, str],
    ) -> Bulk:  # fmt: skip
        """Runs no engine. Raises ``BadInput`` for options and counts of images that can't be right; what depends on
        the engines is refused where they are."""
        options = SampleOptions.from_keywords(keywords)
        make_plan(manifest, options.plan)
        cycled = {name: _rows(keywords.get(name)) for name in ("prompt", "negative_prompt", *_EMBEDDINGS)}
        latents = options.latents if isinstance(options.latents, np.ndarray) else None
        labels, seeds = count_images(manifest, options, latents, {name: rows for name, rows in cycled.items() if rows})
        rest = {name: value for name, value in keywords.items() if name not in ("n", "seed", "seeds", "labels")}
        return Bulk(
            open_runtime=open_runtime, describe=describe, bundle=digest(manifest), seeds=seeds, labels=labels,
            keywords=cast("SampleKeywords", rest), shard=shard, kind=kind, tile=tile, partial=partial, loras=loras,
        )  # fmt: skip

    @property
    def images(self) -> int:
        return len(self.seeds)

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard)

    def size(self, index: int) -> int:
        """Images of shard ``index``."""
        return min(self.shard, self.images - index * self.shard)

    def request(self, index: int) -> SampleKeywords:
        """The keywords of ``Runtime.sample`` for one shard."""
        start = index * self.shard
        stop = start + self.size(index)
        found: dict[str, Any] = dict(self.keywords)
        for name in ("prompt", "negative_prompt", *_EMBEDDINGS):
            if (rows := _rows(found.get(name))) > 1:
                found[name] = _take(found[name], [image % rows for image in range(start, stop)])
        if found.get("latents") is not None:
            found["latents"] = found["latents"][start:stop]
        found["seeds"] = self.seeds[start:stop]
        if self.labels:
            found["labels"] = self.labels[start:stop]
        return cast("SampleKeywords", found)

    def load(self) -> Runtime:
        """The runtime that draws shards. Raises what ``tstitch_trt.load`` does, and ``BadInput`` for another bundle."""
        runtime = self.open_runtime()
        try:
            if (found := digest(runtime.manifest)) != self.bundle:
                raise BadInput(
                    f"the bundle {str(runtime.bundle.root)!r} of this machine has the digest {found[:12]}, and the one "
                    f"of the machine that started the run {self.bundle[:12]}",
                    hint="copy the same bundle to all machines, or put it where all of them see it",
                )
            for name, files in self.loras.items():
                runtime.swap_lora(name, files)
        except BaseException:
            runtime.close()
            raise
        return runtime

    def draw(self, runtime: Runtime, index: int) -> DrawnShard:
        """Draws one shard. Raises what ``Runtime.sample`` does; ``partial``: images that become NaN are left out."""
        first = index * self.shard
        try:
            result = runtime.sample(decode=True, tile=self.tile, partial=self.partial, **self.request(index))
        except NotFinite as error:
            if not self.partial or not error.failed:
                raise
            return DrawnShard(index, (), tuple(replace(each, image=first + each.image) for each in error.failed))
        assert result.images is not None
        failed = tuple(replace(each, image=first + each.image) for each in result.failed)
        drawn = list(result.drawn)
        if self.kind == "npz":
            file = io.BytesIO()
            np.save(file, result.images[drawn], allow_pickle=False)
            return DrawnShard(index, ((f"{index:06d}.npy", file.getvalue()),), failed)
        settings, each = self.describe(runtime.manifest, result)
        files = [
            (png_name(first + image, self.images), picture_file(result.images[image], settings, each[image]))
            for image in drawn
        ]
        return DrawnShard(index, tuple(files), failed)

    def settings(self) -> dict[str, str]:
        """All that decides about the pictures, as short texts: two runs that draw the same have the same."""
        own: dict[str, object] = {
            **self.keywords, "seeds": self.seeds, "labels": self.labels, "images": self.images, "shard": self.shard,
            "kind": self.kind, "tile": self.tile, "partial": self.partial, "loras": self.loras, "digest": self.bundle,
        }  # fmt: skip
        return {name: _text(value) for name, value in sorted(own.items()) if value is not None}


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of a journal."""

    version: Literal[1]
    settings: dict[str, str]


class _Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A further line: the files of a shard are there, as many as it says."""

    shard: int
    names: tuple[str, ...]
    failed: tuple[FailedImage, ...] = ()


class Run:
    """The folder that a run's files go to, with its journal. A context manager: two runs can't have one folder."""

    def __init__(self, output: Path, settings: Mapping[str, str]) -> None:
        """``output``: the folder of PNG files, or a file ``.npz``, which has a folder beside it until it is whole.

        Finished shards of an earlier run stay if they have the same ``settings``, else ``BadInput`` is raised.
        """
        self.output = output
        self.folder = output if output.suffix.lower() != ".npz" else output.with_name(f"{output.name}.run")
        self._finished: dict[int, _Finished] = {}
        self.folder.mkdir(exist_ok=True)
        self._file: IO[bytes] = (self.folder / JOURNAL).open("a+b")
        try:
            self._lock()
            self._read(_Record(1, dict(settings)))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def finished(self) -> frozenset[int]:
        return frozenset(self._finished)

    @property
    def failed(self) -> tuple[FailedImage, ...]:
        """The images that were not drawn, in their order."""
        return tuple(sorted((f for each in self._finished.values() for f in each.failed), key=lambda f: f.image))

    def keep(self, drawn: DrawnShard) -> None:
        """Writes the files of a shard, and then the line that says that they are there."""
        for name, content in drawn.files:
            write_bytes(self.folder / name, content)
        done = _Finished(drawn.index, tuple(name for name, _ in drawn.files), drawn.failed)
        self._append(done)
        self._finished[drawn.index] = done

    def complete(self) -> None:
        """After the last shard: the ``.npz`` is written, and its folder removed."""
        if self.folder == self.output:
            return
        paths = [self.folder / name for _, each in sorted(self._finished.items()) for name in each.names]
        shapes = [_load(path).shape for path in paths]
        if paths:
            join_npz(self.output, map(_load, paths), (sum(shape[0] for shape in shapes), *shapes[0][1:]))
        shutil.rmtree(self.folder)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(
                f"another run writes to {str(self.output)!r}", hint="wait for it, or write elsewhere with -o"
            ) from None

    def _read(self, record: _Record) -> None:
        path = self.folder / JOURNAL
        try:
            *lines, torn = read_bounded(path, _JOURNAL_BYTES).split(b"\n")
            if torn:  # the run was ended while it wrote this line
                self._file.truncate(sum(len(line) + 1 for line in lines))
            if not lines:
                self._append(record)
                return
            found = convert(decode_json(lines[0]), _Record, word="journal")
            each = [convert(decode_json(line), _Finished, word="journal") for line in lines[1:]]
        except DecodeError as error:
            raise BadInput(
                f"{path} is no journal of a run: {error}", hint=f"write to another place with -o, or remove {path}"
            ) from None
        before, now = found.settings, record.settings
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise BadInput(
                    f"{str(self.output)!r} has pictures of a run with {name} = {before.get(name, 'nothing')[:200]}, "
                    f"and this one has {now.get(name, 'nothing')[:200]}",
                    hint=f"write to another place with -o, or remove {str(self.folder)!r}",
                )
        self._finished = {one.shard: one for one in each if self._has(one)}
        for half in self.folder.glob(HALF_WRITTEN):  # by a run that was killed
            half.unlink(missing_ok=True)

    def _has(self, one: _Finished) -> bool:
        names = [name for name in one.names if "/" in name or not (self.folder / name).is_file()]
        return not names

    def _append(self, line: msgspec.Struct) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _load(path: Path) -> NDArray[np.uint8]:
    return cast("NDArray[np.uint8]", load_array(path, option="shard"))


def _rows(value: object) -> int:
    """How many images a text or an embedding is for; 0 where it was not said."""
    if value is None:
        return 0
    if isinstance(value, str):
        return 1
    return max(map(_rows, value.values())) if isinstance(value, Mapping) else len(cast("Sequence[object]", value))


def _take(value: Any, rows: list[int]) -> object:
    if isinstance(value, Mapping):
        return {name: _take(array, rows) for name, array in value.items()}
    return value[rows] if isinstance(value, np.ndarray) else [value[row] for row in rows]


def _text(value: object) -> str:
    """A value as a text that is equal for equal values; of arrays and long texts a hash."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(one)}" for name, one in sorted(value.items()))
    if isinstance(value, np.ndarray):
        sha = hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
        return f"{value.dtype}{list(value.shape)} sha256 {sha[:32]}"
    text = repr(list(value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 200 else f"{text[:60]}... sha256 {hashlib.sha256(text.encode()).hexdigest()[:32]}"
