"""The wheel and the source distribution: what is in them, and that they install and run where nothing else is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename

from support.bindings import require_index

ROOT = Path(__file__).parents[1]
PACKAGES = {"tstitch_trt": "", "tstitch_export": "export/", "tstitch_engines": "engines/"}
NETWORK = re.compile(r"PIP_\w+|(https?|no|all)_proxy|(SSL|REQUESTS)_\w+", re.IGNORECASE)

USER = """
from pathlib import Path

import tstitch_trt
from tstitch_engines import _kernels
from tstitch_export.build import build


def draw(bundle: Path) -> tstitch_trt.Result:
    build("fashion", output=bundle)
    with tstitch_trt.load(bundle) as runtime:
        return runtime.sample(labels=[0, 1], steps=4, fraction=0.5)


kernels: bool = _kernels.HAS_FATBIN
steps: str = tstitch_trt.load("fashion.bundle").sample(labels=[0]).seeds
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel made of it: those in ``$TSTITCH_TEST_DIST``, or made here, without CUDA."""
    if made := os.environ.get("TSTITCH_TEST_DIST"):
        return Path(made)
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", folder, ROOT]
    environment = {**os.environ, "TSTITCH_CUDA": "OFF", "PIP_RETRIES": "1"}
    require_index(subprocess.run(command, capture_output=True, text=True, env=environment))
    return folder


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    (path,) = dist.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def repaired(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as auditwheel releases it: for the oldest Linux that its libraries allow."""
    folder = tmp_path_factory.mktemp("repaired")
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new virtual environment with nothing in it."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin"


def pip_install(bare: Path, *what: str | Path) -> subprocess.CompletedProcess[str]:
    """No program can be found but those of the environment, so that no compiler is there."""
    kept = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
    command = [sys.executable, "-m", "pip", "--python", bare / "python", "install", "--no-compile", *what]
    environment = {**kept, "PATH": str(bare), "PIP_QUIET": "0", "PIP_RETRIES": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def installed(bare: Path, repaired: Path) -> Path:
    require_index(pip_install(bare, f"{repaired}[cpu]"))
    return bare


def run_bare(installed: Path, folder: Path, *words: str) -> str:
    command = [installed / words[0], *words[1:]]
    environment = {"PATH": str(installed), "HOME": str(folder)}  # as env -i
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources() -> set[str]:
    """The files of the three packages as the repository has them, by their place in a wheel."""
    command = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        *(f"{PACKAGES[p]}{p}" for p in PACKAGES),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return {line.removeprefix("export/").removeprefix("engines/") for line in done.stdout.splitlines()}


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    built = {
        name for name in names if re.match(r"tstitch_engines/(_kernels\.[^/]*so|src/[^/]+|step_kernels.fatbin)$", name)
    }
    assert {"tstitch_engines/src/cuda_driver.cu", "tstitch_engines/src/step.hpp"} < built
    assert sum(name.endswith(".so") for name in built) == 1
    info = {name for name in names if ".dist-info/" in name}
    assert any(name.endswith("/licenses/LICENSE") for name in info)
    assert names - built - info == sources()


def test_the_wheel_is_typed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"{package}/py.typed" for package in PACKAGES} < set(names)
    assert "tstitch_engines/_kernels.pyi" in names


def test_the_metadata_is_valid_and_shows_the_readme(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = Metadata.from_email(archive.read(name), validate=True)
    assert said.description_content_type == "text/markdown"
    assert said.description is not None
    assert said.description.strip() == (ROOT / "README.md").read_text().strip()
    assert said.requires_python is not None
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(said.classifiers or ()), re.MULTILINE)
    assert versions
    assert all(version in said.requires_python for version in versions)


def test_the_source_distribution_is_what_the_build_needs(sdist: Path) -> None:
    """That it is enough, the wheel shows, which was made of it."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = {"engines/src", *(f"{PACKAGES[package]}{package}" for package in PACKAGES), "tests/tstitch_engines/c"}
    other = {name for name in names if not any(name.startswith(f"{folder}/") for folder in folders)}
    top = {
        "CMakeLists.txt",
        "CMakePresets.json",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "engines/README.md",
    }
    assert top <= other <= top | {"CHANGELOG.md"}
    assert not [name for name in names if re.search(r"\.(so|pyc|fatbin)$|__pycache__", name)]


def test_the_repaired_wheel_is_for_many_linuxes_and_carries_no_library(wheel: Path, repaired: Path) -> None:
    _, _, _, tags = parse_wheel_filename(repaired.name)
    assert all(tag.platform.startswith("manylinux") for tag in tags)
    before, after = (set(zipfile.ZipFile(path).namelist()) for path in (wheel, repaired))
    assert not [name for name in after - before if ".dist-info/" not in name and not name.endswith("/")]


def test_without_a_compiler_the_last_line_of_the_build_says_what_to_install(bare: Path, sdist: Path) -> None:
    done = pip_install(bare, "--no-deps", sdist)
    said = done.stdout + done.stderr
    if "Failed building wheel" not in said:
        require_index(done)
    *_, last = said.partition("[end of output]")[0].strip().splitlines()
    assert "needs a C++17 compiler and Python's headers: apt install g++ python3-dev" in last
    assert "or install a wheel" in last
    assert "Traceback" not in said


def test_the_demo_runs_where_only_the_wheel_is_installed(installed: Path, tmp_path: Path) -> None:
    assert run_bare(installed, tmp_path, "tstitch-trt", "--version").startswith("tstitch-trt 0.")
    said = run_bare(installed, tmp_path, "tstitch-trt", "demo", "--samples", "10", "--steps", "4")
    assert "speed-up" in said
    assert (tmp_path / "tstitch-demo.png").stat().st_size > 10_000


def test_a_users_program_is_checked_against_the_installed_types(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed / "python", "user.py"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    wrong = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(wrong) == 1, done.stdout + done.stderr
    assert f"user.py:{USER.rstrip().count(chr(10)) + 1}:" in wrong[0]
    assert 'variable has type "str"' in wrong[0]
