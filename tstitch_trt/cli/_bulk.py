"""``tstitch-trt sample --ray``: many images in shards, drawn by the workers of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import option
from tstitch_trt.cli._settings import describe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tstitch_engines.bundle.bundle import Bundle
    from tstitch_trt.cli._options import LoadOptions
    from tstitch_trt.request.options import SampleKeywords
    from tstitch_trt.runtime.result import FailedImage
    from tstitch_trt.runtime.vae import Tile

__all__ = ["BulkOptions", "DrawnInBulk"]

DEFAULT_SHARD = 64


@dataclass(frozen=True)
class DrawnInBulk:
    """``before``: images of the run that earlier calls had drawn."""

    images: int
    before: int
    shards: int
    failed: tuple[FailedImage, ...]


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    ray: bool = option("Draw with Ray, in shards: run it again to go on. The cluster is $RAY_ADDRESS, or this machine.")
    workers: int | None = option("With --ray: the most workers. [as many as fit]", "N", least=1)
    shard: int | None = option(
        f"With --ray: images of a shard, which one worker draws at once. [{DEFAULT_SHARD}]", "N", least=1, most=4096
    )

    def check(self) -> None:
        """Raises ``BadInput`` for options that would have no effect."""
        for flag, value in (("--workers", self.workers), ("--shard", self.shard)):
            if value is not None and not self.ray:
                raise BadInput(f"{flag} {value} says how --ray draws", hint=f"add --ray, or leave {flag} out")

    def draw(
        self, bundle: Bundle, output: Path, asked: SampleKeywords, load: LoadOptions, *, tile: Tile, partly: bool,
        loras: Mapping[str, str], kept: Mapping[str, object],
    ) -> DrawnInBulk:  # fmt: skip
        """Draws what is not drawn yet. Ctrl-C loses nothing but the shards that are being drawn."""
        from tstitch_engines.compile.select import default_backend
        from tstitch_trt.images.write import kind_of
        from tstitch_trt.progress import log, progress_bar
        from tstitch_trt.serve.bulk import Bulk, Run
        from tstitch_trt.serve.ray_bulk import cluster, draw_shards

        kind = kind_of(output)
        if kind == "png":
            raise BadInput(
                f"-o {str(output)!r} is one grid; --ray writes a folder of PNG files, or an .npz",
                hint=f"write -o {output.with_suffix('')} or -o {output.with_suffix('.npz')}",
            )
        gpu = load.device != "cpu"
        if load.device not in ("cpu", "cuda") or load.rebuild:
            said = "--rebuild" if load.rebuild else f"--device {load.device}"
            raise BadInput(
                f"{said} is for one machine, and --ray draws on several",
                hint="first: sample --rebuild without --ray"
                if load.rebuild
                else "--device cuda: each worker has a GPU",
            )
        backend = load.backend or default_backend(bundle)
        # Ray would set as many threads as a worker has CPUs, which may differ from run to run, and sums with it.
        key = load.require_signature
        here = replace(load, threads=load.threads or (None if gpu else 1), require_signature=key and key.absolute())
        where = {"bundle": bundle.root.name, "device": load.device, "backend": backend}
        bulk = Bulk.of(
            bundle.manifest, asked, open_runtime=partial(here.open, bundle.root.absolute()),
            describe=partial(describe, where=where, kept=kept), shard=self.shard or DEFAULT_SHARD, kind=kind, tile=tile,
            partial=partly, loras={name: _absolute(files) for name, files in loras.items()},
        )  # fmt: skip
        settings = {**bulk.settings(), **where, "threads": str(here.threads)}
        with Run(output, settings) as run, progress_bar("sampling", bulk.images, counted="images") as bar:
            before = sum(map(bulk.size, run.finished))
            bar.update(done=before)
            left = [shard for shard in range(bulk.shards) if shard not in run.finished]
            if before:
                log(f"{before} of {bulk.images} images were drawn before")
            if left:
                with cluster():
                    for drawn in draw_shards(bulk, left, workers=self.workers, cpus=here.threads or 1, gpus=int(gpu)):
                        run.keep(drawn)
                        bar.advance(bulk.size(drawn.index))
            run.complete()
            return DrawnInBulk(bulk.images, before, bulk.shards, run.failed)


def _absolute(files: str) -> str:
    """``FILE[:WEIGHT],...`` for workers, whose folder is another one."""
    from tstitch_export.families.lora.fuse import locate_loras
    from tstitch_export.hub.checkpoints import Checkpoints

    return ",".join(str(Path(each).absolute()) for each in locate_loras(files, Checkpoints()).split(","))
