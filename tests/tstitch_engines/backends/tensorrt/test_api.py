"""Every attribute of TensorRT that is used exists in the real bindings of every supported version, oldest to newest.

What is used is read from the code: mypy refuses an attribute that no protocol declares, so the protocols are all of it;
methods that the code overrides are found in its source.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from support.bindings import Surface, surface
from support.tensorrt_names import CLASSES, ENUMS
from tstitch_engines.backends import tensorrt
from tstitch_engines.backends.tensorrt import api, enums, network, options, plan

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


def declared(protocol: type) -> tuple[str, ...]:
    """The names that a protocol lists, in their order."""
    return tuple(name for name in {**protocol.__annotations__, **vars(protocol)} if not name.startswith("_"))


def bound(version: str, wheels: Path) -> Surface:
    if version == "10.1" and sys.version_info >= (3, 13):
        pytest.skip("TensorRT 10.1 has no wheel for this Python")
    return surface(*VERSIONS[version], wheels)


def used() -> list[str]:
    """``Class`` and ``Class.member`` for all that the package can name."""
    names = {"__version__", *declared(api.Library), *overridden()}
    for owner, protocol in {**CLASSES, **ENUMS}.items():
        names |= {owner, *(f"{owner}.{member}" for member in declared(protocol))}
    return sorted(names)


def overridden() -> set[str]:
    """Methods of ours that the library calls: those of a class made from ``base``, in the function that says

    base: Any = library.Class
    """
    found = set()
    for path in Path(tensorrt.__path__[0]).glob("*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            bases = [
                node.value.attr
                for node in ast.walk(function)
                if isinstance(node, ast.AnnAssign)
                and ast.unparse(node.target) == "base"
                and isinstance(node.value, ast.Attribute)
            ]
            for node in ast.walk(function):
                if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["base"]:
                    (owner,) = bases
                    methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
                    found |= {f"{owner}.{name}" for name in methods if name != "__init__"}
    return found


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


def test_nothing_can_be_used_that_is_not_declared() -> None:
    """What is ``Any`` would let any attribute through; the rest of the names come from tables."""
    open_ends = {name for name, kind in api.Library.__annotations__.items() if "Any" in kind}
    assert open_ends == {"IProgressMonitor", "IStreamWriter", "IAttentionOutputLayer", "ISoftMaxLayer"}
    assert overridden() == {
        "ILogger.log",
        "IProgressMonitor.phase_start",
        "IProgressMonitor.step_complete",
        "IProgressMonitor.phase_finish",
        "IStreamWriter.write",
    }
    assert set(network.DTYPES.values()) == set(declared(enums.DataTypes))
    assert set(options.TILING.values()) == set(declared(enums.TilingLevels))
    assert set(options.VERBOSITY.values()) == set(declared(enums.Verbosities))
    assert set(options.HARDWARE.values()) - {None} == set(declared(enums.HardwareLevels))
    assert set(plan.DIAGNOSES) == set(declared(enums.Invalidities))


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
    assert not weak & set(declared(enums.BuilderFlags))
    # The names that 11 and RTX dropped are not used.
    assert not {"device_memory", "device_memory_size", "weight_streaming_budget"} & set(declared(api.CudaEngine))


def test_a_declaration_that_no_binding_has_would_be_found(wheels: Path) -> None:
    found = bound("rtx 1.7", wheels)
    assert not there(found, "Builder.build_engine_with_config")  # removed after 10
    assert there(found, "Builder.create_network")
