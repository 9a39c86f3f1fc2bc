"""Decides what a build makes on this machine; the PEP 517 backend of pip and other installers.

The backend is that of setuptools. It adds what a fixed list in pyproject.toml cannot express: torch
is needed for the build only if a library is built, and is fetched only if the Python that the
package is installed into has none. The build uses the headers and libraries of torch and does not
import it. setup.py takes its decisions from here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import setuptools
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent
LEAST_SETUPTOOLS = 77  # `license` in pyproject.toml is a string
LEAST_CUDA = (12, 0)  # bulk copies (PTX ISA 8.0)


def load(name: str) -> ModuleType:
    """A file of the package, imported by path: the package itself needs torch."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "ghost_ops" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


env = load("environment")
torch_version = load("torch_version")


def fail(message: str) -> NoReturn:
    """End the build. The message is the last line of its output."""
    raise SystemExit(f"ghost_ops: {message}")


# ---------------------------------------------------------------- torch


@dataclass(frozen=True)
class Torch:
    """An installed torch."""

    root: Path
    version: str
    is_target: bool  # of the Python that the package is installed into, as far as it can be known


def site_folders(prefix: str) -> list[str]:
    """The package folders of a Python or virtual environment."""
    layout = {"base": prefix, "platbase": prefix}
    paths = [sysconfig.get_path(key, vars=layout) for key in ("purelib", "platlib")]
    return list(dict.fromkeys([*paths, *site.getsitepackages([prefix])]))


def find_torch() -> Torch | None:
    """The torch to build with.

    An isolated build does not have the packages of its Python on ``sys.path``. They are looked up
    where they are installed. Any torch >= 2.10 gives the same library, so that an environment that
    may be another than the target serves as well.
    """
    spec = importlib.util.find_spec("torch")
    target = [str(Path(spec.origin).parent.parent)] if spec and spec.origin else []
    target += site_folders(sys.prefix)
    others = [*site_folders(sys.base_prefix), site.getusersitepackages()]
    if sees_outer_packages():
        target += others
    if active := os.environ.get("VIRTUAL_ENV"):
        others = [*site_folders(active), *others]
    found = [torch_in(folder, is_target=True) for folder in target]
    found += [torch_in(folder, is_target=False) for folder in others]
    torches = [torch for torch in found if torch]
    usable = [t for t in torches if not torch_version.is_too_old(t.version)]
    if torches and torches[0].is_target and torches[0] not in usable:
        fail(
            f"torch >= {'.'.join(map(str, torch_version.LEAST))} is needed, and {torches[0].root} "
            f"is torch {torches[0].version}: pip install --upgrade '{torch_version.REQUIREMENT}'"
        )
    return usable[0] if usable else None


def sees_outer_packages() -> bool:
    """Whether this Python, outside of an isolated build, sees the system's and user's packages."""
    settings = Path(sys.prefix) / "pyvenv.cfg"
    if sys.prefix == sys.base_prefix or not settings.exists():
        return True
    text = settings.read_text(encoding="utf-8").lower()
    return re.search(r"^include-system-site-packages\s*=\s*true", text, re.MULTILINE) is not None


def torch_in(folder: str, is_target: bool) -> Torch | None:
    root = Path(folder) / "torch"
    try:
        text = (root / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    if (version := re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)) is None:
        return None
    return Torch(root.resolve(), version[1], is_target)


# ---------------------------------------------------------------- compilers


def run(command: list[str]) -> tuple[bool, str]:
    """Whether a command succeeds, and what it prints, or why it cannot be started."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    return done.returncode == 0, (done.stderr + done.stdout).strip()


def failure(command: list[str]) -> str | None:
    """Why a command fails, in one line; None if it succeeds."""
    succeeds, text = run(command)
    if succeeds:
        return None
    lines = text.splitlines() or ["without a message"]
    telling = [line for line in lines if re.search(r"error|fatal", line, re.IGNORECASE)]
    return (telling or lines)[0].strip()


def cannot_compile(compiler: list[str], suffix: str, text: str) -> str | None:
    """Why a compiler does not compile a short text, in one line; None if it does."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"probe{suffix}"
        source.write_text(text)
        return failure([*compiler, "-std=c++17", "-c", str(source), "-o", f"{source}.o"])


def find_cxx() -> str | None:
    if explicit := os.environ.get("CXX"):
        if shutil.which(shlex.split(explicit)[0]) is None:
            fail(f"the compiler named by CXX was not found: {explicit!r}")
        return explicit
    found = map(shutil.which, ("c++", "g++", "clang++"))
    return next((path for path in found if path), None)


def missing_cxx() -> str | None:
    """Why there is no C++ compiler to build with; None if there is one."""
    if (cxx := find_cxx()) is None:
        return "no C++ compiler was found (install g++ or clang++, or name one in CXX)"
    program = "#include <vector>\nint main() { if constexpr (true) return std::vector<int>{}[0]; }"
    if why := cannot_compile(shlex.split(cxx), ".cpp", program):
        return f"the C++ compiler {cxx} does not compile five words of C++17 ({why})"
    return None


def missing_for_cpu() -> str | None:
    """What the system lacks for the CPU library, as a sentence; None if nothing."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if (missing := missing_cxx()) is None and not header.exists():
        return f"the Python headers were not found ({header}; install the python3-dev package)"
    return missing


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME or CUDA_PATH; if neither is set, of the PATH or of /usr/local/cuda."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        nvcc = Path(home) / "bin" / "nvcc"
        return str(nvcc) if nvcc.exists() else None
    usual = Path("/usr/local/cuda/bin/nvcc")
    return str(usual) if usual.exists() else shutil.which("nvcc")


def cuda_root(nvcc: str) -> Path | None:
    """The folder of the toolkit: nvcc on the PATH can be a script that calls another one."""
    _, dryrun = run([nvcc, "--dryrun", "-x", "cu", os.devnull])
    found = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
    return Path(found[1].strip()).resolve() if found else None


def nvcc_release(nvcc: str) -> tuple[int, int] | None:
    found = re.search(r"\brelease (\d+)\.(\d+)", run([nvcc, "--version"])[1])
    return (int(found[1]), int(found[2])) if found else None


def broken_nvcc(nvcc: str) -> str | None:
    """Why the CUDA library cannot be built with nvcc; None if it can."""
    if why := failure([nvcc, "--version"]):
        return f"it cannot be started ({why})"
    if (release := nvcc_release(nvcc)) is None:
        return "`nvcc --version` names no release"
    name = "{}.{}".format(*release)
    if release < LEAST_CUDA:
        return f"it is of CUDA {name}, and {'.'.join(map(str, LEAST_CUDA))} is needed"
    if (root := cuda_root(nvcc)) is None:
        return "it does not tell where its toolkit is"
    if not list((root / "lib64").glob("libcudart*")):
        return f"there is no libcudart in lib64 of its toolkit {root}"
    host = ["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
    if why := cannot_compile([nvcc, *host], ".cu", "__global__ void f() {}\n"):
        return f"it does not compile one line ({why})"
    return None


def missing_for_cuda() -> str | None:
    """What the system lacks for the CUDA library, as a sentence; None if nothing."""
    if (nvcc := find_nvcc()) is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"CUDA_HOME={home} has no bin/nvcc" if home else "nvcc was not found"
        return f"{where} (install the CUDA toolkit, or set CUDA_HOME to its folder)"
    if why := broken_nvcc(nvcc):
        return f"nvcc does not work: {nvcc}: {why}"
    return missing_cxx()


# ---------------------------------------------------------------- what is built


@dataclass(frozen=True)
class Decision:
    """For each library why it is left out; None if it is built."""

    cpu: str | None
    cuda: str | None
    torch: Torch | None

    def record(self) -> dict[str, str]:
        """The content of build_record.json; see ghost_ops/build_record.py."""
        found = {"cpu": self.cpu or "built", "cuda": self.cuda or "built"}
        if self.torch and None in (self.cpu, self.cuda):
            found["torch"] = self.torch.version
            _, version = run([*shlex.split(find_cxx() or ""), "--version"])
            found["compiler"] = version.partition("\n")[0]
        if self.cuda is None:
            found["nvcc"] = "{}.{}".format(*(nvcc_release(find_nvcc() or "") or (0, 0)))
            found["architectures"] = env.CUDA_ARCHS.get()
        return found


def decide() -> Decision:
    """What is built here: what the variables say, and what the machine has."""
    try:
        torch = find_torch()
        cpu = left_out(env.BUILD_CPU, missing_for_cpu)
        return Decision(cpu, left_out(env.BUILD_CUDA, missing_for_cuda), torch)
    except ValueError as error:  # a variable with a value that is not allowed
        fail(str(error))


def left_out(variable, missing) -> str | None:
    choice = variable.get()
    if choice == "0":
        return f"left out by {variable.name}=0"
    if (why := missing()) and choice == "1":
        fail(f"{variable.name}=1, but {why}.")
    return why


# ---------------------------------------------------------------- hooks of PEP 517 and PEP 660


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    decision = decide()
    builds = None in (decision.cpu, decision.cuda)
    return [torch_version.REQUIREMENT] if builds and decision.torch is None else []


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None) -> str:
    check_setuptools()
    folder, settings = os.path.abspath(metadata_directory), quiet(config_settings)
    with writable_sources():
        return build_meta.prepare_metadata_for_build_wheel(folder, settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None) -> str:
    return prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    check_setuptools()
    folder, settings = os.path.abspath(wheel_directory), quiet(config_settings)
    metadata = os.path.abspath(metadata_directory) if metadata_directory else None
    with writable_sources():
        return build_meta.build_wheel(folder, settings, metadata)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    check_setuptools()
    if not is_writable(ROOT):
        fail(f"an editable installation builds inside {ROOT}, which is read-only: pip install .")
    return build_meta.build_editable(wheel_directory, quiet(config_settings), metadata_directory)


def check_setuptools() -> None:
    """pip's --no-build-isolation does not look at the requirements in pyproject.toml."""
    if int(setuptools.__version__.partition(".")[0]) < LEAST_SETUPTOOLS:
        needed = f"setuptools>={LEAST_SETUPTOOLS}"
        fail(f"{needed} is needed, not {setuptools.__version__}: pip install --upgrade '{needed}'")


def quiet(config_settings: dict | None) -> dict:
    """Settings without setuptools' line for each file copied; `pip install -C verbose=1 .` asks."""
    given = config_settings or {}
    return given if {"verbose", "--verbose"} & set(given) else {"quiet": "1", **given}


def is_writable(root: Path) -> bool:
    """Whether a build can write beside the sources in ``root``."""
    try:
        for folder in (root, root / "build"):
            if folder.exists():
                tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def writable_sources() -> Iterator[None]:
    """Works in the checkout, or in a temporary copy of it if it is read-only."""
    if is_writable(ROOT):
        yield
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ignored = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "build_record.json")
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy2(path, folder)
            elif path.name in ("ghost_ops", "csrc"):
                shutil.copytree(path, Path(folder) / path.name, ignore=ignored)
        stack.callback(os.chdir, os.getcwd())
        os.chdir(folder)
        yield
