"""``tstitch-trt cache``: what the component cache and accelerated pipelines hold, and making room in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import Command, option, tstitch_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tstitch_engines.bundle.cache import Stored

__all__ = ["command"]

EXAMPLES = """
tstitch-trt cache
tstitch-trt cache list --json
tstitch-trt cache prune --max-size 20GB
tstitch-trt cache prune --older-than 30d
tstitch-trt cache clear
"""


class _Group(Command, click.Group):
    pass


@click.group("cache", cls=_Group, examples=EXAMPLES, invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Show or empty the cache of exports and engines, $TSTITCH_TRT_CACHE or the user's cache folder.

    Bundles do not need the cache; it saves the time of building an unchanged part again. Bundles that
    tstitch_trt.accelerate made are kept beside it and are counted too. Without a subcommand: list.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_command, as_json=False)


@tstitch_command("list", "tstitch-trt cache list\ntstitch-trt cache list --json", bundle=False)
def list_command(as_json: bool) -> None:
    """List what is stored, last used first."""
    import time

    from tstitch_engines.bundle.cache import Cache
    from tstitch_trt.cli._text import print_json, print_table, size
    from tstitch_trt.pipeline.bundle_cache import kept_bundles

    cache = Cache()
    entries = sorted([*cache.stored(), *kept_bundles()], key=lambda entry: -entry.used)
    total = sum(entry.bytes for entry in entries)
    if as_json:
        from tstitch_trt.cli._documents import CacheEntry, CacheOutput

        listed = [
            CacheEntry(key=e.key, what=e.what, bytes=e.bytes, used=e.used, seconds=e.info.get("seconds"))
            for e in entries
        ]
        print_json(CacheOutput(path=str(cache.root), bytes=total, entries=listed))
        return
    now = time.time()
    print_table(
        ("what", "size", "used", "made in", "key"),
        [(e.what, size(e.bytes), _ago(now - e.used), _seconds(e.info.get("seconds")), e.key[:12]) for e in entries],
    )
    click.echo(f"{cache.root}: {len(entries)} entries, {size(total)}")


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_size: str | None = option("Keep this much of what was used last, e.g. 20GB or 500MiB.", "SIZE")
    older_than: str | None = option("Remove what was not used for so long, e.g. 30d, 12h or 2w.", "AGE")


@tstitch_command(
    "prune",
    "tstitch-trt cache prune --max-size 20GB\ntstitch-trt cache prune --older-than 30d",
    bundle=False,
    limits=Limits,
)
def prune_command(limits: Limits, as_json: bool) -> None:
    """Remove what was not used for long, or what does not fit into a size.

    Bundles of pipelines go before the exports and engines that they are made from. What a build is using stays.
    """
    from tstitch_engines.bundle.cache import Cache
    from tstitch_trt.cli._parsing import parse_age, parse_size
    from tstitch_trt.pipeline.bundle_cache import prune_kept

    if limits.max_size is None and limits.older_than is None:
        raise BadInput(
            "prune needs --max-size or --older-than, got neither",
            hint="e.g. tstitch-trt cache prune --max-size 20GB; tstitch-trt cache clear removes everything",
        )
    limit = None if limits.max_size is None else parse_size(limits.max_size, option="--max-size")
    age = None if limits.older_than is None else parse_age(limits.older_than, option="--older-than")
    cache = Cache()
    removed = cache.prune(max_bytes=limit, older_than=age)
    left = None if limit is None else limit - sum(entry.bytes for entry in cache.stored())
    _say([*removed, *prune_kept(max_bytes=left, older_than=age)], as_json)


@tstitch_command("clear", "tstitch-trt cache clear", bundle=False)
def clear_command(as_json: bool) -> None:
    """Remove everything but what a build is using, also damaged and incomplete entries."""
    from tstitch_engines.bundle.cache import Cache
    from tstitch_trt.pipeline.bundle_cache import prune_kept

    _say([*Cache().prune(), *prune_kept()], as_json)


for subcommand in (list_command, prune_command, clear_command):
    command.add_command(subcommand)


def _say(removed: Sequence[Stored], as_json: bool) -> None:
    from tstitch_trt.cli._text import print_json, size

    freed = sum(entry.bytes for entry in removed)
    if as_json:
        from tstitch_trt.cli._documents import CachePruned, RemovedEntry

        gone = [RemovedEntry(key=e.key, what=e.what, bytes=e.bytes) for e in removed]
        print_json(CachePruned(removed=gone, bytes=freed))
        return
    for entry in removed:
        click.echo(f"removed {entry.what} ({size(entry.bytes)})")
    click.echo(f"{len(removed)} entries removed, {size(freed)} freed")


def _ago(seconds: float) -> str:
    for length, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {word} ago"
    return "now"


def _seconds(value: object) -> str:
    return f"{value:.1f} s" if isinstance(value, float) else ""
