"""Specs, bundle manifests, devices, backends and errors: what loads and runs engines. Never imports torch by itself."""

from __future__ import annotations

from tstitch_engines.backends import BACKENDS, Backend, Engine, open_backend
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.base import Buffer, Device
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadInput, FailedWork, TStitchError
from tstitch_engines.spec import Range, ShapeProfile, TensorSpec

__all__ = [
    "BACKENDS",
    "Backend",
    "BadInput",
    "Buffer",
    "Bundle",
    "Device",
    "Engine",
    "FailedWork",
    "Manifest",
    "Range",
    "ShapeProfile",
    "TStitchError",
    "TensorSpec",
    "open_backend",
    "open_bundle",
    "open_device",
]
