"""``tstitch_trt.accelerate`` with pipelines that start from, paint into or follow a picture: equal to diffusers'."""

from __future__ import annotations

import pytest

pytestmark = [
    # diffusers hands numpy its tensors in a way that newer versions of numpy warn of
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed:FutureWarning"),
]
