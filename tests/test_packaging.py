"""What is installed is complete, lean and loadable, with a compiler and without one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import check_update_running

import ghost_ops
from ghost_ops import backends, build_record, environment

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(ghost_ops.__file__).parent
PURE = {"GHOST_OPS_BUILD_CPU": "0", "GHOST_OPS_BUILD_CUDA": "0"}

in_checkout = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="only where the sources are: there is no setup.py"
)


def run(
    *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this Python; the GHOST_OPS_* variables are those given and no others."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GHOST_OPS_")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**clean, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff")


BUILD_FILES = ("setup.py", "build_backend.py", "pyproject.toml")


def copy_tree(target: Path, *, with_csrc: bool = True) -> Path:
    """A clean checkout: the files that a distribution is made of, and nothing built."""
    for name in (*BUILD_FILES, "MANIFEST.in", "LICENSE", "Makefile", *PAGES):
        target.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.o", "build_record.json")
    folders = ["ghost_ops", "tests", "benchmarks", "examples", "docs", ".ci"] + ["csrc"] * with_csrc
    for name in folders:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def build(
    kind: str, source: Path, target: Path, env: dict[str, str]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Build a wheel or sdist as pip's --no-build-isolation does, through the PEP 517 hook."""
    target.mkdir(exist_ok=True)
    hook = f"import build_backend; build_backend.build_{kind}({str(target)!r})"
    done = run("-c", hook, cwd=source, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = target.iterdir()
    return result, done


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("pure")
    return build("wheel", copy_tree(base / "source"), base / "dist", PURE)[0]


@pytest.fixture(scope="module")
def pure_install(pure_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(target)
    return target


def run_installed(
    site: Path, *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run with the package in ``site``; -S keeps out a ghost_ops installed in develop mode."""
    path = os.pathsep.join([str(site), *(entry for entry in sys.path if entry)])
    return run("-S", *arguments, cwd=cwd, env={"PYTHONPATH": path, **(env or {})})


def native_library() -> Path:
    spec = importlib.util.find_spec("ghost_ops._C")
    if spec is None or spec.origin is None:
        pytest.skip("the native CPU library is not built")
    return Path(spec.origin)


def cuda_library() -> Path:
    if not backends.cuda.PATH.exists():
        pytest.skip("the native CUDA library is not built")
    return backends.cuda.PATH


def symbols(*arguments: str | Path) -> list[str]:
    """Lines of ``nm``, demangled, without addresses: 'U aoti_torch_library_impl'."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    text = subprocess.run(
        ["nm", "-C", *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout
    return [re.sub(r"^[0-9a-f]*\s+", "", line) for line in text.splitlines()]


def assert_wheel_is_lean(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    info = f"ghost_ops-{ghost_ops.__version__}.dist-info"
    assert tops == {"ghost_ops", info}
    assert f"{info}/licenses/LICENSE" in names
    modules = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "ghost_ops/py.typed" in names
    assert "ghost_ops/build_record.json" in names
    assert all(
        Path(name).suffix in (".py", ".typed", ".so", ".json") for name in names if info not in name
    )


# ---------------------------------------------------------------- distributions


@in_checkout
def test_pure_wheel_has_the_python_files_and_no_library(pure_wheel: Path) -> None:
    names = zipfile.ZipFile(pure_wheel).namelist()
    assert_wheel_is_lean(names)
    assert not [name for name in names if name.endswith(".so")]
    assert pure_wheel.name == f"ghost_ops-{ghost_ops.__version__}-py3-none-any.whl"


@in_checkout
def test_native_wheel_has_the_libraries_and_a_platform_tag(tmp_path: Path) -> None:
    library = native_library()
    if library.parent != ROOT / "ghost_ops":
        pytest.skip("the library under test was not built in this checkout")
    # In the checkout itself, so that the compiled objects are used again; the rest goes elsewhere.
    # fmt: off
    done = run("setup.py", "-q", "egg_info", "--egg-base", tmp_path,
               "build", "--build-base", tmp_path / "build",
               "bdist_wheel", "--bdist-dir", tmp_path / "bdist", "--dist-dir", tmp_path / "dist",
               cwd=ROOT)
    # fmt: on
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert_wheel_is_lean(names)
    assert f"ghost_ops/{library.name}" in names
    assert ("ghost_ops/_cuda.so" in names) == (ROOT / "ghost_ops" / "_cuda.so").exists()
    assert not wheel.name.endswith("-any.whl")
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name


@in_checkout
@pytest.mark.slow
def test_wheel_builds_from_the_sdist(tmp_path: Path) -> None:
    native_library()
    sdist, _ = build("sdist", copy_tree(tmp_path / "source"), tmp_path / "sdist", {})
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    env = {"GHOST_OPS_BUILD_CPU": "1", "GHOST_OPS_BUILD_CUDA": "0"}
    wheel, _ = build("wheel", source, tmp_path / "wheel", env)
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert libraries == [f"ghost_ops/{native_library().name}"]


@in_checkout
def test_sdist_has_all_that_a_build_and_a_test_need(tmp_path: Path) -> None:
    source = copy_tree(tmp_path / "source")
    sdist, _ = build("sdist", source, tmp_path / "sdist", {})
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"LICENSE", "Makefile", *BUILD_FILES, ".ci/run", *PAGES}
    for folder in ("csrc", "ghost_ops", "tests", "benchmarks", "examples", "docs"):
        files = [path for path in (source / folder).rglob("*") if path.is_file()]
        wanted |= {path.relative_to(source).as_posix() for path in files}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "record.json"))]


# ---------------------------------------------------------------- builds that cannot be complete


@in_checkout
def test_without_a_compiler_the_build_is_pure_and_records_why(tmp_path: Path) -> None:
    source = copy_tree(tmp_path / "source")
    nothing = tmp_path / "empty"
    nothing.mkdir()
    env = {"PATH": str(nothing), "CXX": "", "CUDA_HOME": str(nothing)}
    wheel, done = build("wheel", source, tmp_path / "dist", env)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "copying" not in done.stdout, "it prints a line for each file"
    record = json.loads(zipfile.ZipFile(wheel).read("ghost_ops/build_record.json"))
    assert "no C++ compiler was found" in record["cpu"]
    assert f"CUDA_HOME={nothing} has no bin/nvcc" in record["cuda"]


@in_checkout
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"GHOST_OPS_BUILD_CPU": "1", "CXX": "", "PATH": ""}, "no C++ compiler was found"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
        ({"GHOST_OPS_BUILD_CPU": "yes"}, "GHOST_OPS_BUILD_CPU='yes'"),
        ({"GHOST_OPS_BUILD_CUDA": "2"}, "GHOST_OPS_BUILD_CUDA='2'"),
    ],
    ids=["required", "wrong CXX", "wrong CPU value", "wrong CUDA value"],
)
def test_a_build_request_that_cannot_be_met_fails(
    env: dict[str, str], message: str, tmp_path: Path
) -> None:
    source = copy_tree(tmp_path / "source", with_csrc=False)
    for command in (("setup.py", "build_ext"), ("-c", REQUIRES)):
        done = run(*command, cwd=source, env=env)
        assert done.returncode != 0
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


REQUIRES = "import build_backend; print(build_backend.get_requires_for_build_wheel())"


@in_checkout
def test_a_compile_error_fails_the_build(tmp_path: Path) -> None:
    native_library()  # so there is a compiler
    source = copy_tree(tmp_path / "source", with_csrc=False)
    (source / "csrc" / "core").mkdir(parents=True)
    (source / "csrc" / "core" / "broken.cpp").write_text("int f() { return nonsense; }\n")
    done = run("setup.py", "build_ext", cwd=source, env={"GHOST_OPS_BUILD_CUDA": "0"})
    assert done.returncode != 0
    assert "nonsense" in done.stdout + done.stderr
    assert "compiling ghost_ops._C failed" in done.stderr.splitlines()[-1]


NVCC = r"""#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release {release}, V1" ;;
*--dryrun*) echo "#\$ TOP={root}" >&2 ;;
*) echo "probe.cu(1): error: no such thing" >&2; exit 1 ;;
esac
"""
BROKEN_NVCC = {
    "cannot be started": ("garbage", 0o644),
    "names no release": ("#!/bin/sh\necho hello\n", 0o755),
    "is of CUDA 11.4, and 12.0 is needed": (NVCC.replace("{release}", "11.4"), 0o755),
    "does not tell where its toolkit is": (
        NVCC.replace("{release}", "13.0").replace("TOP", "NOTHING"),
        0o755,
    ),
    "does not compile one line (probe.cu(1): error: no such thing)": (
        NVCC.replace("{release}", "13.0"),
        0o755,
    ),
}


@in_checkout
@pytest.mark.parametrize("why", BROKEN_NVCC)
def test_a_broken_nvcc_leaves_out_the_cuda_library(why: str, tmp_path: Path) -> None:
    native_library()  # so there is a compiler
    root = tmp_path / "cuda"
    (root / "bin").mkdir(parents=True)
    (root / "lib64").mkdir()
    (root / "lib64" / "libcudart.so").touch()
    text, mode = BROKEN_NVCC[why]
    (root / "bin" / "nvcc").write_text(text.replace("{root}", str(root)))
    (root / "bin" / "nvcc").chmod(mode)
    code = "import build_backend; print(build_backend.decide().cuda)"
    done = run("-c", code, cwd=ROOT, env={"CUDA_HOME": str(root)})
    assert f"nvcc does not work: {root}/bin/nvcc: " in done.stdout, done.stderr
    assert why in done.stdout
    required = run("-c", code, cwd=ROOT, env={"CUDA_HOME": str(root), "GHOST_OPS_BUILD_CUDA": "1"})
    assert required.returncode != 0
    assert why in required.stderr.splitlines()[-1]


# ---------------------------------------------------------------- the torch of the build


def stub_torch(site: Path, version: str) -> Path:
    """Files that name a version of torch, and nothing else."""
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "version.py").write_text(f"__version__ = {version!r}\n")
    (site / "torch" / "__init__.py").write_text("from .version import __version__\n")
    return site


def isolated(code: str, prefix: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in ROOT without any packages but setuptools, as in a Python with this prefix."""
    setuptools = str(Path(importlib.util.find_spec("setuptools").origin).parent.parent)
    start = f"""
import site, sys
sys.path.append({setuptools!r})
import setuptools.build_meta
sys.path.remove({setuptools!r})
sys.prefix, sys.base_prefix = {str(prefix)!r}, {str(prefix / "outer")!r}
site.getusersitepackages = lambda: "/nowhere"
"""
    return run("-S", "-c", start + code, cwd=ROOT, env={"VIRTUAL_ENV": "", **env})


def packages_of(prefix: Path) -> Path:
    return prefix / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"


@in_checkout
@pytest.mark.parametrize(
    ("installed", "wanted"), [("2.10.0", "[]"), ("2.13.0+cpu", "[]"), (None, "['torch>=2.10']")]
)
def test_an_isolated_build_takes_the_torch_that_is_installed(
    installed: str | None, wanted: str, tmp_path: Path
) -> None:
    native_library()  # so there is a compiler
    if installed:
        stub_torch(packages_of(tmp_path), installed)
    done = isolated(REQUIRES, tmp_path, GHOST_OPS_BUILD_CUDA="0")
    assert done.stdout.strip() == wanted, done.stderr


@in_checkout
def test_a_build_environment_takes_the_torch_of_the_active_one(tmp_path: Path) -> None:
    native_library()
    stub_torch(packages_of(tmp_path / "active"), "2.12.0")
    env = {"VIRTUAL_ENV": str(tmp_path / "active"), "GHOST_OPS_BUILD_CUDA": "0"}
    assert isolated(REQUIRES, tmp_path / "build", **env).stdout.strip() == "[]"
    version = packages_of(tmp_path / "active") / "torch" / "version.py"
    version.write_text("__version__ = '2.9.1'\n")  # of another Python than the target, perhaps
    done = isolated(REQUIRES, tmp_path / "build", **env)
    assert done.stdout.strip() == "['torch>=2.10']", done.stderr


@in_checkout
def test_nothing_is_compiled_without_a_compiler_so_no_torch_is_needed(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "CXX": "", "CUDA_HOME": str(tmp_path)}
    assert isolated(REQUIRES, tmp_path, **env).stdout.strip() == "[]"


@in_checkout
def test_a_torch_that_is_too_old_stops_the_build(tmp_path: Path) -> None:
    stub_torch(packages_of(tmp_path), "2.9.1+cu128")
    done = isolated(REQUIRES, tmp_path)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line == (
        f"ghost_ops: torch >= 2.10 is needed, and {packages_of(tmp_path)}/torch is torch "
        "2.9.1+cu128: pip install --upgrade 'torch>=2.10'"
    )


@in_checkout
def test_a_setuptools_that_is_too_old_stops_the_build() -> None:
    code = "import setuptools, build_backend; setuptools.__version__ = '65.5.0'; build_backend."
    for hook in ("prepare_metadata_for_build_wheel", "build_wheel", "build_editable"):
        done = run("-c", f"{code}{hook}('/tmp')", cwd=ROOT)
        assert done.stderr == (
            "ghost_ops: setuptools>=77 is needed, not 65.5.0: pip install --upgrade "
            "'setuptools>=77'\n"
        )


def test_a_torch_that_is_too_old_stops_the_import(tmp_path: Path) -> None:
    path = os.pathsep.join([str(stub_torch(tmp_path, "2.9.1")), str(PACKAGE.parent)])
    done = run("-c", "import ghost_ops", cwd=tmp_path, env={"PYTHONPATH": path})
    assert done.stderr.splitlines()[-1] == (
        "ImportError: ghost_ops needs torch >= 2.10, and this Python has torch 2.9.1: "
        "pip install --upgrade 'torch>=2.10'"
    )


# ---------------------------------------------------------------- the record


@in_checkout
def test_a_build_in_place_keeps_the_record_of_a_library_that_it_leaves(tmp_path: Path) -> None:
    source = copy_tree(tmp_path / "source", with_csrc=False)
    package = source / "ghost_ops"
    (package / "_cuda.so").touch()
    old = {"cpu": "built", "cuda": "built", "nvcc": "13.0", "torch": "2.13.0"}
    (package / "build_record.json").write_text(json.dumps(old))
    done = run("setup.py", "-q", "build_ext", "--inplace", cwd=source, env=PURE)
    assert done.returncode == 0, done.stderr
    record = json.loads((package / "build_record.json").read_text())
    assert record == {**old, "cpu": "left out by GHOST_OPS_BUILD_CPU=0"}


@in_checkout
def test_a_file_that_left_the_sources_is_not_in_the_wheel(tmp_path: Path) -> None:
    source = copy_tree(tmp_path / "source", with_csrc=False)
    gone = source / "ghost_ops" / "gone.py"
    gone.touch()
    first, _ = build("wheel", source, tmp_path / "first", PURE)
    gone.unlink()
    second, _ = build("wheel", source, tmp_path / "second", PURE)
    assert "ghost_ops/gone.py" in zipfile.ZipFile(first).namelist()
    assert_wheel_is_lean(zipfile.ZipFile(second).namelist())


@pytest.mark.parametrize("text", [None, "", "{", '"text"', "[]"])
def test_a_record_that_is_missing_or_broken_is_none(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_record, "PATH", tmp_path / "ghost_ops" / "build_record.json")
    if text is not None:
        build_record.PATH.parent.mkdir()
        build_record.PATH.write_text(text)
    assert build_record.read() == {}
    assert build_record.why_missing("cuda") == (
        "with a C++17 compiler and nvcc, `pip install .` in the checkout of ghost_ops builds it"
    )


# ---------------------------------------------------------------- read-only checkouts


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A checkout that not even root can write to: a mount."""
    source = copy_tree(tmp_path / "source", with_csrc=False)
    target = tmp_path / "read only"
    target.mkdir()
    mount = ["mount", "--bind", "-o", "ro", str(source), str(target)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        if os.geteuid() == 0:
            pytest.skip("this root can neither mount nor be refused")
        shutil.rmtree(target)
        source.rename(target)
        for path in [target, *target.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
        yield target
        for path in [target, *target.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
        return
    yield target
    subprocess.run(["umount", str(target)], check=True)


@in_checkout
def test_a_wheel_is_built_from_a_read_only_checkout(read_only: Path, tmp_path: Path) -> None:
    wheel, _ = build("wheel", read_only, tmp_path / "dist", PURE)
    assert_wheel_is_lean(zipfile.ZipFile(wheel).namelist())


@in_checkout
@pytest.mark.parametrize(
    "command",
    [
        ("setup.py", "build_ext", "--inplace"),
        ("-c", "import build_backend; build_backend.build_editable('/tmp')"),
    ],
    ids=["in place", "editable"],
)
def test_a_build_inside_a_read_only_checkout_says_so(
    command: tuple[str, ...], read_only: Path
) -> None:
    done = run(*command, cwd=read_only, env=PURE)
    assert done.returncode != 0
    assert "read-only" in done.stderr.splitlines()[-1]
    assert "pip install ." in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- the pure Python install


PURE_SCRIPT = """
import warnings
import ghost_ops, torch
from ghost_ops import backends
assert ghost_ops.__file__.startswith({site!r}), ghost_ops.__file__
x = torch.randn(2, 3, 5, 5, requires_grad=True)
module = ghost_ops.FusedGhostModule(3, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        module(x).sum().backward()
told = [str(w.message) for w in caught if "not built" in str(w.message)]
assert len(told) == 1 and "left out by GHOST_OPS_BUILD_CPU=0" in told[0], told
assert x.grad.shape == x.shape and x.grad.abs().sum() > 0
assert backends.select("cpu", torch.float32) == "eager"
try:
    ghost_ops.use_backend("native")
except RuntimeError as error:
    assert "not built" in str(error)
else:
    raise AssertionError("an explicit request for what is not there must raise")
print("fine")
"""


@in_checkout
def test_pure_install_trains_and_says_what_is_missing(pure_install: Path, tmp_path: Path) -> None:
    script = PURE_SCRIPT.format(site=str(pure_install))
    done = run_installed(pure_install, "-c", script, cwd=tmp_path)
    assert done.stdout.strip() == "fine", done.stdout + done.stderr


@in_checkout
def test_pure_install_reports_the_missing_library(pure_install: Path, tmp_path: Path) -> None:
    done = run_installed(pure_install, "-m", "ghost_ops", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert not info["libraries"]["cpu"]["loaded"]
    assert "not built" in info["libraries"]["cpu"]["reason"]
    assert {row["backend"] for row in info["backends"]} == {"eager"}


@in_checkout
def test_explicit_native_raises_at_the_first_call(pure_install: Path, tmp_path: Path) -> None:
    script = "import ghost_ops, torch; ghost_ops.FusedGhostModule(3, 8)(torch.ones(2, 3, 4, 4))"
    env = {"GHOST_OPS_BACKEND": "native"}
    done = run_installed(pure_install, "-c", script, cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert "RuntimeError: backend 'native' was requested" in done.stderr


# ---------------------------------------------------------------- the libraries


@pytest.mark.parametrize("find", [native_library, cuda_library], ids=["cpu", "cuda"])
def test_library_uses_only_the_stable_abi_of_torch(find) -> None:
    undefined = symbols("-D", "--undefined-only", find())
    unstable = [s for s in undefined if re.search(r"\b(at|c10|caffe2|torch)::", s)]
    assert unstable == []
    # The registration itself must be among the undefined symbols, or the list was not read.
    assert [s for s in undefined if re.search(r"\b(aoti_torch|torch)_library_impl$", s)]


@pytest.mark.parametrize("find", [native_library, cuda_library], ids=["cpu", "cuda"])
def test_library_keeps_its_symbols_to_itself(find) -> None:
    exported = symbols("-D", "--defined-only", find())
    assert exported
    ours = [s for s in exported if re.search(r"\bghost(_ops)?::", s) and "std::" not in s]
    assert ours == []


@in_checkout
def test_no_static_initialiser_needs_special_instructions() -> None:
    """Initialisers run at load time, before the instruction set is chosen."""
    objects = [
        path
        for path in (ROOT / "build" / "ninja").rglob("*.o")
        if re.search(r"\.avx(2|512)\.cpp$", path.stem)
    ]
    if not objects:
        pytest.skip("no AVX objects were built in this checkout")
    for path in objects:
        assert [s for s in symbols(path) if "_GLOBAL__sub_I" in s] == [], path.name


def test_cuda_library_is_refused_with_a_reason_by_a_cpu_torch() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    assert not backends.cuda.load()
    assert "without CUDA" in backends.cuda.reason()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_running_statistics_match_the_formula(dtype: torch.dtype) -> None:
    cuda_library()
    assert backends.cuda.load(), backends.cuda.reason()
    update = torch.ops.ghost_ops.ghost_update_running_
    check_update_running(update, dtype, dtype, 8, device="cuda")


# ---------------------------------------------------------------- the variables


@pytest.mark.parametrize("name", ["GHOST_OPS_BACKEND", "GHOST_OPS_CPU_ISA", "GHOST_OPS_CUDA_PDL"])
def test_a_wrong_value_is_an_error_at_import(name: str, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(PACKAGE.parent), name: "foo"}
    done = run("-c", "import ghost_ops", cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert f"ValueError: environment variable {name}='foo': expected one of '" in done.stderr


@in_checkout
def test_every_variable_is_declared_and_in_the_readme() -> None:
    files = [
        ROOT / "setup.py",
        ROOT / "build_backend.py",
        *PACKAGE.rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    read = re.compile(r"environ\S*[\[(]\s*[\"'](GHOST_OPS_[A-Z_]+)")
    native = re.compile(r"getenv\(\s*\"(GHOST_OPS_[A-Z_]+)")
    used = {name for path in files for name in read.findall(path.read_text())}
    for path in (ROOT / "csrc").rglob("*.cpp"):
        used |= set(native.findall(path.read_text()))
    declared = {variable.name for variable in environment.VARIABLES}
    assert used <= declared
    readme = (ROOT / "README.md").read_text()
    assert {name for name in declared if name not in readme} == set()


@in_checkout
def test_pages_link_to_files_that_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").glob("*.md")]
    links = {
        page.parent / link
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    }
    assert links
    assert [str(path) for path in links if not path.exists()] == []


@in_checkout
def test_makefile_lists_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = {line.split()[0] for line in done.stdout.splitlines() if line[:1].isalpha()}
    assert targets >= {"demo", "test", "bench", "lint", "docs", "clean"}


@in_checkout
def test_versions_written_in_several_files_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {ghost_ops.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    hooks = ROOT / ".pre-commit-config.yaml"
    if hooks.exists():  # not in a distribution
        pins = set(re.findall(r"[a-z-]+==[\d.]+", hooks.read_text()))
        assert pins <= set(re.findall(r"[a-z-]+==[\d.]+", project))
        assert {pin.partition("==")[0] for pin in pins} == {"ruff", "clang-format"}
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if workflow.exists():
        (matrix,) = re.findall(r"python-version: \[(.*)\]", workflow.read_text())
        assert re.findall(r"3\.\d+", matrix) == re.findall(r"Python :: (3\.\d+)", project)
