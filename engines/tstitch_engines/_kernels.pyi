"""Host driver of the step kernels (engines/src). Wrong dtypes raise ``TypeError``, wrong shapes ``ValueError``."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ROW_FIELDS: Final[tuple[str, ...]]
FLAG_LEARNED: Final[int]
FLAG_STORE: Final[int]
FLAG_STORE_Y: Final[int]
FLAG_INPAINT: Final[int]
FLAG_GIVEN_NOISE: Final[int]
HISTORY: Final[int]
INITIAL_NOISE_STEP: Final[int]
PARALLEL_WORK: Final[int]
"""Elements (noise counts twelve times) from which on a call uses more than one thread."""
HAS_FATBIN: Final[bool]
"""Whether the build found nvcc or NVRTC and installed ``step_kernels.fatbin`` beside this module."""
ISAS: Final[tuple[str, ...]]

class Arena:
    def __init__(
        self,
        latents: NDArray[np.float32],
        history: NDArray[np.float32],
        rows: NDArray[np.float32],
        step: NDArray[np.int32],
        seed: NDArray[np.int64],
        fault: NDArray[np.int32],
        y: NDArray[np.float32] | None = None,
        image: NDArray[np.float32] | None = None,
        mask: NDArray[np.float32] | None = None,
        noise: NDArray[np.float32] | None = None,
        spatial: int = 0,
        threads: int = 0,
        isa: str | None = None,
    ) -> None: ...
    def prepare(
        self, active: NDArray[np.int32], sample: NDArray[Any], timestep: NDArray[Any], guided: bool
    ) -> None: ...
    def advance(self, active: NDArray[np.int32], model_output: NDArray[Any], guided: bool, rescale: bool) -> None: ...

def gather_rows(active: NDArray[np.int32], source: NDArray[np.uint8], target: NDArray[Any]) -> None: ...
def normals(
    out: NDArray[np.float32], seed: int, step: int, scale: float = 1.0, threads: int = 0, isa: str | None = None
) -> None: ...
def philox(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int, /) -> tuple[int, int, int, int]: ...
def to_float32(source: NDArray[Any], out: NDArray[np.float32], isa: str | None = None) -> None: ...
def from_float32(source: NDArray[np.float32], out: NDArray[Any], isa: str | None = None) -> None: ...
