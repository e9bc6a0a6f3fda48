"""The layout of one row of a step table as the kernels read it: 16 float32, the same on CPU and CUDA.

    m  = c                                   if not guided
    m  = u + G (c - u)                       on the first GUIDED_CHANNELS channels, c on the others
    m  = RESCALE (std(c)/std(m)) m + (1 - RESCALE) m     over the same channels (arXiv 2305.08891, eq. 15-16)
    D  = P x + Q m
    x' = A x + B D + C D1 + E D2 + S z       D1, D2: the estimates one and two steps before; z: Gaussian noise

With the ``LEARNED`` flag the noise scale of each element is ``S exp(lo + (hi - lo)(w + 1)/2)`` where ``w`` is the
model's second half of channels and ``lo``, ``hi`` are ``LOG_STD_MIN``, ``LOG_STD_MAX``, the logarithms of standard
deviations (half of Improved DDPM's log variances, arXiv 2102.09672, eq. 15).

``engines/src/step.hpp`` has the same names; a test compares the two.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FLAG_LEARNED", "FLAG_STORE", "INITIAL_NOISE_STEP", "ROW", "ROW_FIELDS"]

ROW_FIELDS: Final = (
    "T",  # timestep given to the member
    "C_IN",  # factor on the latent before the member sees it
    "P",
    "Q",
    "A",
    "B",
    "C",
    "E",
    "S",
    "G",  # guidance scale
    "RESCALE",  # guidance rescale, 0 = off
    "GUIDED_CHANNELS",  # how many leading channels are guided
    "LOG_STD_MIN",
    "LOG_STD_MAX",
    "FLAGS",  # sum of FLAG_*, as a float
    "RESERVED",
)
ROW: Final = {name: index for index, name in enumerate(ROW_FIELDS)}

FLAG_LEARNED: Final = 1  # the noise scale is read from the model's second half of channels
FLAG_STORE: Final = 2  # a later row reads this step's D

INITIAL_NOISE_STEP: Final = 0xFFFFFFFF  # the Philox "step" of a lane's initial latent
