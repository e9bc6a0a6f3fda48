"""Work in a process of its own that may crash, hang or run out of memory, with limits of time and memory."""

from tstitch_engines.child.limits import DEFAULT, Limits, parse_size, show_size
from tstitch_engines.child.memory import free_memory
from tstitch_engines.child.process import Job, end_children, run_in_child
from tstitch_engines.child.protocol import Array, Channel

__all__ = [
    "DEFAULT",
    "Array",
    "Channel",
    "Job",
    "Limits",
    "end_children",
    "free_memory",
    "parse_size",
    "run_in_child",
    "show_size",
]
