"""The layout of one row of a step table as the kernels read it: 25 float32, the same on CPU and CUDA.

    m  = c                                   if not guided
    m  = u + G (c - u)                       on the first GUIDED_CHANNELS channels, c on the others
    m  = RESCALE (std(c)/std(m)) m + (1 - RESCALE) m     over the same channels (arXiv 2305.08891, eq. 15-16)
    D  = P x + Q m
    x' = A x + B D + C D1 + E D2 + F D3 + Y y + S z      D1, D2, D3: estimates of the steps before; z: Gaussian noise
    y' = YX x + YY y + YB D + YC D1 + YE D2 + YF D3      with STORE_Y; without it y stays
    x' = mask x' + (1 - mask) (IMAGE_A x0 + IMAGE_S z0)  with INPAINT

``x`` is the latent and ``y`` a second state that a lane remembers: the latent before a step that is taken twice (PNDM),
or the last corrected latent (UniPC). The last line keeps the picture ``x0`` outside a mask (inpainting): it is
brought to the noise level of ``x'`` by the lane's own initial noise ``z0``, which is drawn again from the seed, or with
``GIVEN_NOISE`` read from memory, for a lane that was started from noise of the caller's.

With the ``LEARNED`` flag the noise scale of each element is ``S exp(lo + (hi - lo)(w + 1)/2)`` where ``w`` is the
model's second half of channels and ``lo``, ``hi`` are ``LOG_STD_MIN``, ``LOG_STD_MAX``, the logarithms of standard
deviations (half of Improved DDPM's log variances, arXiv 2102.09672, eq. 15).

A term with coefficient 0 is not read, and what no flag asks for is not written.

``engines/src/step.hpp`` has the same names; a test compares the two.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "FLAG_GIVEN_NOISE",
    "FLAG_INPAINT",
    "FLAG_LEARNED",
    "FLAG_STORE",
    "FLAG_STORE_Y",
    "HISTORY",
    "INITIAL_NOISE_STEP",
    "ROW",
    "ROW_FIELDS",
]

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
    "F",
    "Y",
    "YX",
    "YY",
    "YB",
    "YC",
    "YE",
    "YF",
    "IMAGE_A",  # noise level of x', for inpainting
    "IMAGE_S",
)
ROW: Final = {name: index for index, name in enumerate(ROW_FIELDS)}

FLAG_LEARNED: Final = 1  # the noise scale is read from the model's second half of channels
FLAG_STORE: Final = 2  # a later row reads this step's D
FLAG_STORE_Y: Final = 4  # y becomes y'
FLAG_INPAINT: Final = 8  # the picture is kept outside the mask
FLAG_GIVEN_NOISE: Final = 16  # z0 of inpainting is in memory, instead of drawn from the seed

HISTORY: Final = 3  # estimates that a lane remembers: D of step i in slot i % 3

INITIAL_NOISE_STEP: Final = 0xFFFFFFFF  # the Philox "step" of a lane's initial latent
