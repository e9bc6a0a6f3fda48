"""The library of a flavour, and the one logger that it gets in this process."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, NamedTuple

from tstitch_engines.backends.tensorrt.api import Library
from tstitch_engines.backends.tensorrt.flavour import Flavour
from tstitch_engines.backends.tensorrt.layers import LOG_HEADING
from tstitch_engines.driver import fitting_extra
from tstitch_engines.errors import Unavailable

__all__ = ["Messages", "Session", "logger_of", "open_library", "session"]

_log = logging.getLogger(__name__)

# A failed call on a machine without a driver says so itself, and then once more like this.
_NO_DRIVER: Final = re.compile(r"In catchCudaError at \S+ \(cudaError 35:")
_INT64: Final = re.compile(r"Make sure input .* has Int64 binding")  # a warning for every input of that type
_OUT_OF_MEMORY: Final = re.compile("out ?of ?memory", re.IGNORECASE)
# "Profile kMIN values...", and kOPT, kMAX: a dimension is fixed inside the graph
_INCONSISTENT: Final = "values are not self-consistent"
_KEPT: Final = 200  # errors, and as many warnings


def open_library(flavour: Flavour) -> Library:
    """The flavour's module. Raises ``Unavailable`` when it is not installed, does not start or is too old."""
    reasons = []
    for name in flavour.modules:
        try:
            module: Any = import_module(name)
        except Exception as error:  # a missing shared library may come as any of several
            reasons.append(f"{name}: {error}")
            continue
        if not hasattr(module, "Builder"):  # a folder of type stubs passes for a package without content
            reasons.append(f"{name}: it has no Builder")
            continue
        if not hasattr(module.IExecutionContext, "set_device_memory"):
            raise Unavailable(
                f"{flavour.title} {module.__version__} is too old; supported is {flavour.versions}",
                hint=f'pip install -U "tstitch-trt[{fitting_extra(flavour.extra)}]"',
            )
        library: Library = module
        return library
    raise Unavailable(
        f"the backend {flavour.name!r} needs {flavour.title} {flavour.versions}, which can't be imported "
        f"({'; '.join(reasons)})",
        hint=f'pip install "tstitch-trt[{fitting_extra(flavour.extra)}]"',
    )


class Messages:
    """What the library said while it was listened to: errors and warnings, each once, the first and the latest of many.

    ``inconsistent``: the warning that the engine can't keep its profile.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.inconsistent: str | None = None
        self.layers = ""  # the message that lists them, of a build in detailed verbosity
        self._of_memory = False
        self._left_out = 0
        self._no_driver: list[str] = []

    def add(self, level: int, text: str) -> None:
        if text.startswith(LOG_HEADING):
            self.layers = text
        if level < logging.WARNING:
            return
        if _INCONSISTENT in text:
            self.inconsistent = self.inconsistent or text
        if level >= logging.ERROR and _OUT_OF_MEMORY.search(text):
            self._of_memory = True
        spoken = self.errors if level >= logging.ERROR else self.warnings
        kept = self._no_driver if _NO_DRIVER.search(text) else spoken
        if text in kept:
            return
        if len(kept) >= _KEPT:
            del kept[_KEPT // 2]
            self._left_out += kept is self.errors
        kept.append(text)

    def forget_errors(self) -> None:
        """For another attempt."""
        self.errors.clear()
        self._left_out, self._of_memory = 0, False

    def of_memory(self) -> bool:
        """Whether an error was a lack of memory."""
        return self._of_memory

    def reason(self) -> str:
        """The errors as one line."""
        found = "; ".join(self.errors or self.warnings or self._no_driver) or "the library gave no reason"
        return f"{found}; and {self._left_out} more errors" if self._left_out else found


class Listener:
    """Takes every message of one library; threads of the library's own call it too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Messages] = []
        self.last_error = ""

    def take(self, level: int, text: str) -> None:
        if level < logging.ERROR and _INT64.search(text):
            return
        with self._lock:
            for messages in self._open:
                messages.add(level, text)
        if level >= logging.ERROR and not (self.last_error and _NO_DRIVER.search(text)):
            self.last_error = text
        # An error comes back as an exception of ours, with this text in it.
        _log.log(logging.DEBUG if level >= logging.ERROR else level, "%s", text)

    @contextmanager
    def listen(self) -> Iterator[Messages]:
        """Collects what is said during the block, on whichever thread."""
        messages = Messages()
        with self._lock:
            self._open.append(messages)
        try:
            yield messages
        finally:
            with self._lock:
                self._open.remove(messages)


_made: Final[dict[str, tuple[Any, Listener]]] = {}
_making = threading.Lock()


def logger_of(library: Library) -> tuple[Any, Listener]:
    """The library's logger and its listener: one for the whole process, because every object made with it refers to it.

    (The two flavours have loggers of different types, so a process may hold one of each.)
    """
    with _making:
        key = library.ILogger.__module__
        if key not in _made:
            listener = Listener()
            base: Any = library.ILogger
            levels = {
                library.ILogger.INTERNAL_ERROR: logging.ERROR,
                library.ILogger.ERROR: logging.ERROR,
                library.ILogger.WARNING: logging.WARNING,
            }

            class Logger(base):  # type: ignore[misc]
                def __init__(self) -> None:
                    base.__init__(self)

                def log(self, severity: Any, text: str) -> None:
                    listener.take(levels.get(severity, logging.DEBUG), text)

            _made[key] = (Logger(), listener)
        return _made[key]


class Session(NamedTuple):
    """A library at work: ``messages`` are what it said so far."""

    flavour: Flavour
    library: Library
    logger: Any
    messages: Messages

    def __str__(self) -> str:
        return f"{self.flavour.title} {self.library.__version__}"

    def sums_in_float32(self) -> bool:
        """Whether a cast to float32 around attention gives a fused kernel with such sums. Only the version tells."""
        numbers = self.library.__version__.split(".")[:2]
        return all(map(str.isdigit, numbers)) and tuple(map(int, numbers)) >= self.flavour.sums_in_float32


@contextmanager
def session(flavour: Flavour, library: Library) -> Iterator[Session]:
    logger, listener = logger_of(library)
    with listener.listen() as messages:
        yield Session(flavour, library, logger, messages)
