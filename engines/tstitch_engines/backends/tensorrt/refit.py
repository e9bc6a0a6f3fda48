"""Other weights into a loaded engine that was compiled with the option refit. Not run on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.tensorrt.api import CudaEngine
from tstitch_engines.backends.tensorrt.library import Session
from tstitch_engines.errors import BadEngine, FailedWork

__all__ = ["refit"]

Arrays = Mapping[str, NDArray[Any]]


def refit(opened: Session, engine: CudaEngine, weights: Arrays, others: Arrays, *, what: str, fix: str) -> None:
    """Gives ``engine`` the ``weights``, by the names of ONNX initialisers, all at once.

    An engine that fused some of them with others wants those again: they are taken from ``others``. ``what`` and
    ``fix`` are for messages. Raises ``BadEngine`` for weights that the engine does not have or has otherwise, before it
    is touched, and ``FailedWork`` when refitting fails.
    """
    library = opened.library
    refitter = library.Refitter(engine, opened.logger)
    known = set(refitter.get_all_weights())
    if lacking := [name for name in weights if name not in known]:
        raise BadEngine(
            f"{what} can't be given {len(lacking)} of {len(weights)} weights, e.g. {lacking[0]}: they were folded into "
            "others when it was compiled",
            hint=fix,
        )
    given: dict[str, NDArray[Any]] = {}  # the library keeps addresses, no values

    def give(values: Arrays, names: Iterable[str]) -> None:
        for name in names:
            array = given[name] = np.ascontiguousarray(values[name])
            wanted = refitter.get_weights_prototype(name)
            # The bytes are all that says of which type an array is: bfloat16 comes as its bits.
            if wanted.size != array.size or wanted.nbytes != array.nbytes:
                raise BadEngine(
                    f"{what} has {name} of {wanted.size} elements in {wanted.nbytes} bytes; given are {array.size} in "
                    f"{array.nbytes}",
                    hint=fix,
                )
            if not refitter.set_named_weights(name, library.Weights(wanted.dtype, array.ctypes.data, array.size)):
                raise BadEngine(f"{what} refuses {name}: {opened.messages.reason()}", hint=fix)

    give(weights, weights)
    while missing := [name for name in refitter.get_missing_weights() if name not in given]:
        if unknown := [name for name in missing if name not in others]:
            raise BadEngine(
                f"{what} wants {len(unknown)} further weights that the ONNX has no values for, e.g. {unknown[0]!r}",
                hint=fix,
            )
        give(others, missing)
    if not refitter.refit_cuda_engine():
        raise FailedWork(
            f"{what} could not be refitted: {opened.messages.reason()}", hint="check the GPU's free memory (nvidia-smi)"
        )
