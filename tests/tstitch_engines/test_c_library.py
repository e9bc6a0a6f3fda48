"""``tstitch::step``: built, tested by ctest (an installed copy too), and documented by what is built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
C_TESTS = Path(__file__).parent / "c"
PAGE = ROOT / "docs" / "how-to" / "c.md"
OLDEST_CMAKE = (3, 22)


PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def run(*command: str | Path) -> str:
    environment = {**os.environ, "PATH": PATH}
    if shutil.which("ninja", path=PATH):
        environment.setdefault("CMAKE_GENERATOR", "Ninja")
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def cmake() -> Path:
    """That of this environment (the extra ``test`` has it), else the system's."""
    path = shutil.which("cmake", path=PATH)
    if path is None:
        pytest.skip("cmake is not installed")
    found = Path(path)
    version = re.search(r"version (\d+)\.(\d+)", run(found, "--version"))
    assert version is not None
    if (int(version[1]), int(version[2])) < OLDEST_CMAKE:
        pytest.skip(f"{found} is older than {OLDEST_CMAKE}")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler is installed")
    return found


C_NAMES = {"test_step", "test_refusals", "test_threads", "test_cuda", "consumer"}


def ctest(cmake: Path, build: Path, *options: str) -> set[str]:
    """Configures, builds and tests; the names of the tests, which all passed."""
    run(cmake, "-S", ROOT, "-B", build, *options)
    run(cmake, "--build", build, "--parallel", "2")
    report = run(cmake.with_name("ctest"), "--test-dir", build, "--output-on-failure")
    assert "100% tests passed" in report
    return set(re.findall(r"Test +#\d+: (\w+)", report))


@pytest.mark.parametrize("preset", ["asan", pytest.param("tsan", marks=pytest.mark.slow)])
def test_sanitizers_find_nothing(cmake: Path, tmp_path: Path, preset: str) -> None:
    """The static library. The presets are CMakePresets.json's, built where the test may write."""
    assert ctest(cmake, tmp_path, f"--preset={preset}") == C_NAMES


@pytest.mark.parametrize("shared", ["ON", pytest.param("OFF", marks=pytest.mark.slow)])
def test_ctest(cmake: Path, tmp_path: Path, shared: str) -> None:
    """The shared library without optimisation, which compiles faster; the static one as it ships."""
    kind = "Debug" if shared == "ON" else "Release"
    options = [f"-DBUILD_SHARED_LIBS={shared}", f"-DCMAKE_BUILD_TYPE={kind}", "-DTSTITCH_WERROR=ON"]
    names = ctest(cmake, tmp_path, "-DTSTITCH_PYTHON=OFF", "-DTSTITCH_CUDA=OFF", *options)
    assert names == C_NAMES | ({"exports"} if shared == "ON" else set())


def test_the_version_is_that_of_the_package(cmake: Path, tmp_path: Path) -> None:
    from importlib.metadata import version

    run(cmake, "-S", ROOT, "-B", tmp_path, "-DTSTITCH_PYTHON=OFF", "-DTSTITCH_CUDA=OFF", "-DTSTITCH_TESTS=OFF")
    text = (tmp_path / "engines" / "src" / "tstitchConfigVersion.cmake").read_text()
    assert f'PACKAGE_VERSION "{version("tstitch-trt")}"' in text


@pytest.mark.parametrize(
    ("language", "files"),
    [("c", ["consumer/walk.c", "cuda_walk.c"]), ("cmake", ["consumer/CMakeLists.txt"])],
)
def test_the_page_shows_what_is_built(language: str, files: list[str]) -> None:
    built = "\n".join((C_TESTS / name).read_text() for name in files).replace("${version} EXACT ", "")
    built = re.sub(r"if\(fatbin.*?endif\(\)\n", "", built, flags=re.DOTALL)
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert block in built, block


def test_the_page_names_what_exists() -> None:
    page = PAGE.read_text()
    cmake_files = "".join(path.read_text() for path in (ROOT / "CMakeLists.txt", ROOT / "engines/src/library.cmake"))
    for option in re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE):
        assert option in cmake_files, option
    presets = json.loads((ROOT / "CMakePresets.json").read_text())["testPresets"]
    assert set(re.findall(r"--preset (\w+)", page)) == {preset["name"] for preset in presets}
