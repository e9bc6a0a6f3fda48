"""Every attribute of TensorRT that is used exists in the real bindings of every supported version, oldest to newest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bindings import Surface, surface
from tstitch_engines.backends.tensorrt import api

VERSIONS = {
    "10.1": ("tensorrt_cu12_bindings==10.1.0", "tensorrt_bindings"),
    "10.13": ("tensorrt_cu12_bindings==10.13.3.9", "tensorrt_bindings"),
    "10.16": ("tensorrt_cu12_bindings==10.16.1.11", "tensorrt_bindings"),
    "11.4": ("tensorrt_cu13_bindings==11.4.0.106", "tensorrt_bindings"),
    "rtx 1.5": ("tensorrt_rtx_cu13_bindings==1.5.0.114", "tensorrt_rtx_bindings"),
    "rtx 1.6": ("tensorrt_rtx_cu13_bindings==1.6.1.120", "tensorrt_rtx_bindings"),
    "rtx 1.7": ("tensorrt_rtx_cu13_bindings==1.7.1.116", "tensorrt_rtx_bindings"),
}
RTX = {name for name in VERSIONS if name.startswith("rtx")}


def bound(version: str, wheels: Path) -> Surface:
    if version == "10.1" and sys.version_info >= (3, 13):
        pytest.skip("TensorRT 10.1 has no wheel for this Python")
    return surface(*VERSIONS[version], wheels)


def members(protocol: type) -> list[str]:
    return [name for name in {**protocol.__annotations__, **vars(protocol)} if not name.startswith("_")]


def used() -> list[str]:
    """``Class`` and ``Class.member`` for all that the package can name: mypy refuses whatever is not declared."""
    names = set(members(api.Library))
    for owner, protocol in api.CLASSES.items():
        names |= {owner, *(f"{owner}.{member}" for member in members(protocol))}
    for owner, values in api.ENUMS.items():
        names |= {owner, *(f"{owner}.{value}" for value in values)}
    return sorted(names)


def there(found: Surface, name: str) -> bool:
    owner, _, member = name.partition(".")
    return owner in found[""] and (not member or member in found[owner])


def probed(name: str) -> bool:
    return name in api.PROBED or name.partition(".")[0] in api.PROBED


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_not_probed_for_is_there(version: str, wheels: Path) -> None:
    found = bound(version, wheels)
    missing = [name for name in used() if not there(found, name) and not probed(name)]
    assert missing == []
    assert len(used()) > 100


def test_every_probe_is_needed_and_can_succeed(wheels: Path) -> None:
    found = {version: bound(version, wheels) for version in VERSIONS}
    for name in sorted(api.PROBED):
        have = {version for version in VERSIONS if there(found[version], name)}
        assert have, f"no version has {name}"
        assert have != set(VERSIONS), f"every version has {name}: no need to look for it"


@pytest.mark.parametrize("name", ["ComputeCapability", "BuilderFlag.REQUIRE_USER_ALLOCATION", "IRuntimeCache"])
def test_rtx_is_told_apart_by_what_it_has(name: str, wheels: Path) -> None:
    assert {version for version in VERSIONS if there(bound(version, wheels), name)} == RTX


@pytest.mark.parametrize("version", VERSIONS)
def test_enumerations_and_calls_that_differ_are_as_the_code_expects(version: str, wheels: Path) -> None:
    found = bound(version, wheels)
    # Weak typing is there in 10.x only; the code never uses what goes with it.
    weak = {"FP16", "BF16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}
    assert (weak & set(found["BuilderFlag"]) == weak) == version.startswith("10.")
    assert not weak & set(api.ENUMS["BuilderFlag"])
    # The names that 11 and RTX dropped are not used.
    assert not {"device_memory", "device_memory_size", "weight_streaming_budget"} & set(members(api.CudaEngine))


def test_a_declaration_that_no_binding_has_would_be_found(wheels: Path) -> None:
    found = bound("rtx 1.7", wheels)
    assert not there(found, "Builder.build_engine_with_config")  # removed after 10
    assert there(found, "Builder.create_network")
