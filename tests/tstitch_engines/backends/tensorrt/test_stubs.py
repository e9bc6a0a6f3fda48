"""mypy holds every call of TensorRT that is declared against the signatures of TensorRT 10.13, from its type stubs.

That the code calls nothing else, and calls it as declared, is mypy's own run over the package.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.bindings import unpacked
from support.tensorrt_names import CLASSES, ENUMS
from support.type_stubs import STUBS, Check, repair
from tstitch_engines.backends.tensorrt import api, enums

SOURCE = "".join(Path(str(module.__file__)).read_text() for module in (enums, api))


@pytest.fixture(scope="module")
def check(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Check:
    return Check(
        stubs=repair(unpacked(STUBS, wheels), tmp_path_factory.mktemp("stubs")),
        classes={name: protocol.__name__ for name, protocol in CLASSES.items()},
        enums={name: protocol.__name__ for name, protocol in ENUMS.items()},
        probed=api.PROBED,
    )


def test_what_is_used_of_tensorrt_has_the_signatures_it_is_used_with(check: Check) -> None:
    assert check.complaints(SOURCE) == []
    # What 10.13 lacks is looked for before use, and all the rest was compared.
    assert "IRuntimeCache" in check.lacking(SOURCE)
    assert not {"IStreamWriter", "ICudaEngine.create_runtime_config"} & set(check.lacking(SOURCE))


@pytest.mark.parametrize(
    ("ours", "other", "words"),
    [
        ("def execute_async_v3(", "def execute_async_v4(", "execute_async_v4"),
        ("parse_from_file(self, path: str)", "parse_from_file(self, path: str, strict: bool)", "parse_from_file"),
        ("def num_io_tensors(self) -> int", "def num_io_tensors(self) -> str", "num_io_tensors"),
        ("create_network(self, flags: int) -> Network |", "create_network(self, flags: int) -> Layer |", "ILayer"),
        ("    WORKSPACE: Any", "    WORKSPACES: Any", "MemoryPools"),
        ("def OnnxParser(self, network: Network, logger", "def OnnxParser(self, logger", "OnnxParser"),
        ("    max_aux_streams: int", "    max_aux_streams: str", "max_aux_streams"),
    ],
)  # fmt: skip
def test_what_tensorrt_does_not_have_so_is_found(check: Check, ours: str, other: str, words: str) -> None:
    assert SOURCE.count(ours) == 1
    assert words in "\n".join(check.complaints(SOURCE.replace(ours, other)))


def test_a_repair_that_no_longer_applies_is_said(wheels: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "tensorrt_bindings" / "tensorrt.pyi"
    other.parent.mkdir(parents=True)
    text = (unpacked(STUBS, wheels) / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    other.write_text(text.replace("channel_axis: int) -> IScaleLayer", "channel_axis: int = 1) -> IScaleLayer"))
    with pytest.raises(AssertionError, match="is there 0 times, not 1"):
        repair(tmp_path / "other", tmp_path / "repaired")
