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
from pathlib import Path

import pytest
import torch
from helpers import check_update_running

import ghost_ops
from ghost_ops import backends, environment

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


def copy_tree(target: Path, *, with_csrc: bool = True) -> Path:
    """A clean checkout: the files that a distribution is made of, and nothing built."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "Makefile", *PAGES):
        target.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.o")
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
    hook = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
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
    assert all(Path(name).suffix in (".py", ".typed", ".so") for name in names if info not in name)


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
    wanted = {"LICENSE", "Makefile", "pyproject.toml", "setup.py", ".ci/run", *PAGES}
    for folder in ("csrc", "ghost_ops", "tests", "benchmarks", "examples", "docs"):
        files = [path for path in (source / folder).rglob("*") if path.is_file()]
        wanted |= {path.relative_to(source).as_posix() for path in files}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


# ---------------------------------------------------------------- builds that cannot be complete


@in_checkout
def test_without_a_compiler_the_build_warns_and_stays_pure(tmp_path: Path) -> None:
    source = copy_tree(tmp_path / "source")
    nothing = tmp_path / "empty"
    nothing.mkdir()
    env = {"PATH": str(nothing), "CXX": ""}
    wheel, done = build("wheel", source, tmp_path / "dist", env)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WARNING (ghost_ops)" in done.stderr
    assert "no C++ compiler was found" in done.stderr
    assert "slower" in done.stderr


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
    done = run("setup.py", "build_ext", cwd=source, env=env)
    assert done.returncode != 0
    assert message in done.stderr


@in_checkout
def test_a_compile_error_fails_the_build(tmp_path: Path) -> None:
    native_library()  # so there is a compiler
    source = copy_tree(tmp_path / "source", with_csrc=False)
    (source / "csrc" / "core").mkdir(parents=True)
    (source / "csrc" / "core" / "broken.cpp").write_text("int f() { return nonsense; }\n")
    done = run("setup.py", "build_ext", cwd=source, env={"GHOST_OPS_BUILD_CUDA": "0"})
    assert done.returncode != 0
    assert "nonsense" in done.stdout + done.stderr
    assert "compiling ghost_ops._C failed" in done.stderr


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
assert len(told) == 1 and "--no-build-isolation" in told[0], told
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
        if re.search(r"_avx(2|512)\.cpp$", path.stem)
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


# ---------------------------------------------------------------- the report and the variables


def test_report_names_libraries_backends_and_variables(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(PACKAGE.parent)}
    done = run("-m", "ghost_ops", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    for text in (ghost_ops.__version__, torch.__version__, "bfloat16", "Libraries of kernels"):
        assert text in done.stdout
    for variable in environment.VARIABLES:
        assert variable.name in done.stdout


def test_json_report_agrees_with_the_process(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(PACKAGE.parent), "GHOST_OPS_BACKEND": "eager"}
    done = run("-m", "ghost_ops", "--json", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["requested_backend"] == "eager"
    assert info["environment"]["GHOST_OPS_BACKEND"]["value"] == "eager"
    assert {row["backend"] for row in info["backends"]} == {"eager"}
    assert info["libraries"]["cpu"]["loaded"] == backends.native.load()
    assert info["versions"]["ghost_ops"] == ghost_ops.__version__


@pytest.mark.parametrize("name", ["GHOST_OPS_BACKEND", "GHOST_OPS_CPU_ISA", "GHOST_OPS_CUDA_PDL"])
def test_a_wrong_value_is_an_error_at_import(name: str, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(PACKAGE.parent), name: "foo"}
    done = run("-c", "import ghost_ops", cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert f"ValueError: environment variable {name}='foo': expected one of '" in done.stderr


@in_checkout
def test_every_variable_is_declared_and_in_the_readme() -> None:
    files = [ROOT / "setup.py", *PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
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


# ---------------------------------------------------------------- the choice of a backend


def test_use_backend_is_a_call_and_a_context_manager() -> None:
    before = backends.requested()
    try:
        with ghost_ops.use_backend("eager"):
            assert backends.select("cpu", torch.float32) == "eager"
            with ghost_ops.use_backend("auto"):
                assert backends.requested() == "auto"
            assert backends.requested() == "eager"
        assert backends.requested() == before
        ghost_ops.use_backend("eager")
        assert backends.requested() == "eager"
    finally:
        ghost_ops.use_backend(before)


def test_use_backend_rejects_an_unknown_name() -> None:
    before = backends.requested()
    with pytest.raises(
        ValueError, match="name must be one of 'auto', 'native', 'triton', 'eager', got 'foo'"
    ):
        ghost_ops.use_backend("foo")
    assert backends.requested() == before


def test_a_dtype_without_kernels_falls_back_or_raises() -> None:
    assert not backends.native.can_run("cpu", torch.float8_e5m2)[0]
    with pytest.warns(UserWarning, match="float8_e5m2"), ghost_ops.use_backend("auto"):
        assert backends.select("cpu", torch.float8_e5m2) == "eager"
    if backends.native.load():
        with (
            ghost_ops.use_backend("native"),
            pytest.raises(RuntimeError, match="float8_e5m2"),
        ):
            backends.select("cpu", torch.float8_e5m2)


def test_select_is_a_constant_of_the_compiled_graph() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * (3.0 if backends.select(x.device.type, x.dtype) == "eager" else 2.0)

    x = torch.ones(2)
    with ghost_ops.use_backend("eager"):
        assert scaled(x)[0] == 3.0
    if backends.native.load():
        with ghost_ops.use_backend("native"):
            assert scaled(x)[0] == 2.0
        with ghost_ops.use_backend("eager"):
            assert scaled(x)[0] == 3.0
