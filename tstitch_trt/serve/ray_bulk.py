"""Shards drawn by Ray Data: each worker has the bundle loaded once, and the files come back to the caller's machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tstitch_engines import errors
from tstitch_engines.errors import BadInput, TStitchError, Unavailable
from tstitch_engines.needs import require
from tstitch_trt.serve.bulk import Bulk, DrawnShard

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["cluster", "draw_shards", "read_row"]


_HINT: Final = "see `ray status`; RAY_ADDRESS=HOST:6379 names a cluster, without it one is started on this machine"
_REACH_SECONDS: Final = 5.0


class _Failure(msgspec.Struct, frozen=True):
    """A ``TStitchError`` that a worker met."""

    kind: str
    message: str
    hint: str


_DECODER = msgspec.msgpack.Decoder(tuple[DrawnShard | None, _Failure | None])


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster of ``$RAY_ADDRESS``, else the one of this machine, else one that is started for the block.

    Nothing is reported to Ray's makers. Raises ``Unavailable`` without Ray or where the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what concerns the caller is raised
    ray = require("ray", "sample --ray", extra="ray")
    require("ray.data", "sample --ray", extra="ray")
    if ray.is_initialized():
        yield
        return
    _check_reachable(os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray has no class of its own for a cluster that does not come up
        raise Unavailable(
            f"Ray does not start or can't be reached: {errors.first_line(error)}",
            hint=_HINT,
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises ``Unavailable`` where nobody listens at HOST:PORT. Ray would try for some minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        return  # "auto", "local", or something that Ray refuses
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise Unavailable(f"no Ray cluster answers at RAY_ADDRESS={address[:100]}: {error}", hint=_HINT) from None


def draw_shards(
    bulk: Bulk, shards: Sequence[int], *, workers: int | None, cpus: int, gpus: int
) -> Iterator[DrawnShard]:
    """The ``shards`` in the order in which they are done. Within ``cluster``.

    ``workers``: at most so many at once, by default as many as the cluster has room for; each takes ``cpus`` and
    ``gpus``. A worker that dies is replaced, and its shard drawn again. Raises what the first shard that failed did.
    """
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    most = _most_workers(ray.cluster_resources(), cpus, gpus)
    used = min(most if workers is None else min(workers, most), len(shards))
    drawn = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards)).map_batches(
        _Worker,
        fn_constructor_args=(bulk,),
        batch_size=1,
        num_cpus=cpus,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=used, initial_size=used),
    )
    for row in drawn.iter_rows():
        yield read_row(row["drawn"])


def read_row(content: bytes) -> DrawnShard:
    """What a worker sent. Raises the error that it met."""
    shard, failure = _DECODER.decode(content)
    if failure is not None:
        kind = getattr(errors, failure.kind, None)
        known = kind if isinstance(kind, type) and issubclass(kind, TStitchError) else errors.FailedWork
        raise known(failure.message, hint=failure.hint)
    assert shard is not None
    return shard


def _most_workers(there: dict[str, float], cpus: int, gpus: int) -> int:
    """How many workers the cluster has room for at once. Raises ``BadInput`` for none."""
    room = {"CPU": cpus, "GPU": gpus}
    most = min(int(there.get(name, 0) // each) for name, each in room.items() if each)
    if most < 1:
        raise BadInput(
            f"a worker takes {cpus} CPUs and {gpus} GPUs, and the cluster has {there.get('CPU', 0):g} CPUs and "
            f"{there.get('GPU', 0):g} GPUs in all",
            hint="use fewer --threads, --device cpu, or a cluster with GPUs (RAY_ADDRESS=HOST:6379)",
        )
    return most


class _Worker:
    """An actor of Ray Data. The bundle is loaded with the first shard, so that what is wrong with it is told."""

    def __init__(self, bulk: Bulk) -> None:
        self._bulk = bulk
        self._runtime: Runtime | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        found = [self._draw(int(shard)) for shard in batch["shard"]]
        return {"drawn": [msgspec.msgpack.encode(each) for each in found]}

    def _draw(self, shard: int) -> tuple[DrawnShard | None, _Failure | None]:
        try:
            if self._runtime is None:
                self._runtime = self._bulk.load()
            return self._bulk.draw(self._runtime, shard), None
        except TStitchError as error:
            return None, _Failure(type(error).__name__, error.message, error.hint)
