"""``pip install .`` in one line works in each world: a clean checkout into a fresh environment.

Each test ends in a fused call, made inside the checkout, which prints the backend that ran it. They
need the package index and take minutes each; ``-s`` shows the times. The environments get the torch
of the Python that runs the tests, as hard links.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there is no setup.py"),
]
COMPILERS = ("c++", "g++", "gcc", "cc", "ld", "as", "ar")  # what g++ starts, too
ENVIRONMENT = "vénv with spaces"
CALL = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, ghost_ops
    module = ghost_ops.FusedGhostModule(4, 6)
    module(torch.randn(2, 4, 5, 5)).sum().backward()
    module.eval()(torch.randn(2, 4, 5, 5))
for warning in caught:
    print("warning:", warning.message)
print("torch", torch.__version__, "file", ghost_ops.__file__)
print("cpu:", ghost_ops.backends.native.reason())
print("cuda:", ghost_ops.backends.cuda.reason())
print("backend", ghost_ops.backends.select("cpu", torch.float32))
"""


def copy_checkout(target: Path) -> Path:
    """The files of the checkout that an installation reads, and nothing built."""
    target.mkdir()
    ignore = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "build_record.json")
    for name in ("ghost_ops", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def requirements(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    """An installed package and all that it requires here, by name."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # of another system, or an extra
    if name not in found:
        found[name] = distribution
        for requirement in distribution.requires or []:
            if "extra ==" not in requirement:
                requirements(re.match(r"[\w.-]+", requirement)[0], found)


class Environment:
    """A fresh virtual environment. ``path`` is all that its PATH has besides the environment."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("GHOST_OPS_", "PYTHON", "CUDA"))
            and key not in ("CXX", "CC", "VIRTUAL_ENV")
        }
        self.env = {**clean, "PATH": os.pathsep.join([str(folder / "bin"), str(path)])}
        self.env["CUDA_HOME"] = str(path / "no-cuda")

    def link_torch(self) -> None:
        """Give the environment the torch of this Python, without a download."""
        found: dict[str, importlib.metadata.Distribution] = {}
        requirements("torch", found)
        requirements("numpy", found)
        (target,) = self.folder.glob("lib/python*/site-packages")
        for distribution in found.values():
            for file in distribution.files or []:
                source = Path(distribution.locate_file(file)).resolve()
                if ".." in file.parts or not source.is_file():
                    continue
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target / file)
                except OSError:
                    shutil.copy(source, target / file)

    def run(self, *command: str | Path, cwd: Path, **env: str) -> str:
        """What a command prints, errors included; it must succeed."""
        start = time.perf_counter()
        done = subprocess.run(
            [str(self.folder / "bin" / "python"), *map(str, command)],
            cwd=cwd,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        print(f"\n{' '.join(map(str, command[:4]))}: {seconds:.0f} s".replace(CALL, "call"))
        assert done.returncode == 0, done.stdout
        return done.stdout


def tools_in(folder: Path) -> Path:
    """A PATH with the C++ compiler and without nvcc."""
    folder.mkdir()
    for name in COMPILERS:
        if found := shutil.which(name):
            (folder / name).symlink_to(Path(found).absolute())
    if not any((folder / name).exists() for name in ("c++", "g++")):
        pytest.skip("there is no C++ compiler")
    return folder


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    return tools_in(tmp_path / "tools")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_checkout(tmp_path / "a chéckout")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """An environment with torch in which a checkout was installed, and the checkout."""
    folder = tmp_path_factory.mktemp("built")
    environment = Environment(folder / ENVIRONMENT, tools_in(folder / "tools"))
    environment.link_torch()
    checkout = copy_checkout(folder / "a chéckout")
    environment.run("-m", "pip", "install", ".", cwd=checkout)
    return environment, checkout


def call(environment: Environment, cwd: Path) -> str:
    said = environment.run("-c", CALL, cwd=cwd)
    print(said)
    assert f"file {environment.folder}" in said, "the checkout shadows the installation"
    return said


def test_a_compiler_and_no_nvcc(built: tuple[Environment, Path]) -> None:
    """The world of a CPU, and of a GPU without the CUDA toolkit."""
    said = call(*built)
    assert "backend native" in said
    assert "warning" not in said
    assert f"torch {torch.__version__}" in said, "another torch was installed"


def test_another_torch_than_built_with(built: tuple[Environment, Path], tmp_path: Path) -> None:
    """One library serves another torch later: that of the Python named by OTHER_TORCH_PYTHON.

    Such an environment takes minutes to make (a CUDA build of torch unpacks to 5 GB), so it is made
    beforehand: ``python -m venv other && other/bin/pip install torch==2.14.1``.
    """
    other = os.environ.get("OTHER_TORCH_PYTHON")
    if not other:
        pytest.skip("OTHER_TORCH_PYTHON names no Python of the same version with another torch")
    environment, checkout = built
    (site,) = environment.folder.glob("lib/python*/site-packages")
    shutil.copytree(site / "ghost_ops", tmp_path / "site" / "ghost_ops")
    env = {**environment.env, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [other, "-c", CALL], cwd=checkout, env=env, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert "backend native" in done.stdout, done.stdout + done.stderr
    assert f"torch {torch.__version__} " not in done.stdout, "it is the same torch"


def test_an_editable_installation_and_back(built: tuple[Environment, Path], tmp_path: Path) -> None:
    environment, checkout = built
    environment.run("-m", "pip", "install", "-e", ".", cwd=checkout)
    said = environment.run("-c", CALL, cwd=tmp_path)
    assert f"file {checkout}" in said
    assert "backend native" in said
    environment.run("-m", "pip", "install", ".", cwd=checkout)
    said = environment.run("-c", CALL, cwd=tmp_path)
    assert f"file {environment.folder}" in said
    assert "backend native" in said


def test_nvcc(tmp_path: Path, checkout: Path, tools: Path) -> None:
    """The world of a GPU with the CUDA toolkit; without a GPU, as far as the library goes."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    (tools / "nvcc").symlink_to(nvcc)
    for name in ("sh", "rm", "cat", "mkdir", "basename", "dirname", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    environment = Environment(tmp_path / ENVIRONMENT, tools)
    del environment.env["CUDA_HOME"]
    environment.link_torch()
    environment.run("-m", "pip", "install", ".", cwd=checkout, GHOST_OPS_CUDA_ARCHS="9.0")
    said = call(environment, checkout)
    assert "backend native" in said
    (package,) = environment.folder.glob("lib/python*/site-packages/ghost_ops")
    assert (package / "_cuda.so").exists()
    if torch.version.cuda is None:
        assert "cuda: torch" in said and "is a build without CUDA" in said
    else:
        assert "cuda: loaded _cuda.so" in said


def test_no_compiler(tmp_path: Path, checkout: Path) -> None:
    """The package says at its first use what is missing, why, and how to get it."""
    (nothing := tmp_path / "nothing").mkdir()
    environment = Environment(tmp_path / ENVIRONMENT, nothing)
    environment.link_torch()
    environment.run("-m", "pip", "install", ".", cwd=checkout)
    said = call(environment, checkout)
    assert "backend eager" in said
    assert said.count("warning:") == 1
    assert "warning: ghost_ops runs plain PyTorch operators on device type 'cpu'" in said
    assert "no C++ compiler was found (install g++" in said
    assert "`pip install .`" in said
    report = environment.run("-m", "ghost_ops", cwd=checkout)
    assert "no C++ compiler was found" in re.sub(r"\s+", " ", report)


def test_no_torch_yet(tmp_path: Path, checkout: Path, tools: Path) -> None:
    """pip fetches torch, here the release that runs the tests, for the build and for the run."""
    environment = Environment(tmp_path / ENVIRONMENT, tools)
    limits = tmp_path / "constraints.txt"
    limits.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    names = ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
    environment.run("-m", "pip", "install", ".", cwd=checkout, **dict.fromkeys(names, str(limits)))
    assert "backend native" in call(environment, checkout)
