"""The facts of the report as data for JSON. Nothing here raises."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from .. import build_record, checkout, environment, torch_version
from .._version import __version__
from . import machine

ROOT = __package__.partition(".")[0]
PACKAGE = Path(__file__).resolve().parent.parent
RESET = "correct it or unset it: `import ghost_ops` raises this; the report goes on without it"
BEFORE_A_BUILD = "correct it or unset it before the next build; an installed ghost_ops ignores it"
INSTALL_TORCH = (
    f"install {torch_version.REQUIREMENT}: https://pytorch.org/get-started/locally has the command"
)
INSTALL_AGAIN = "install ghost_ops again"
WITHOUT_PACKAGE = "torch or ghost_ops does not import"
MEND_ERROR = "mend what the error names; if that is in order, report this output as a bug"
BROKEN = (Exception, SystemExit)  # a broken installation raises errors of any type


class Unavailable(Exception):
    """A fact needs a module that does not import; the report says so once."""


class Findings:
    """Runs the functions that find facts, and keeps what fails."""

    def __init__(self) -> None:
        self._problems: list[dict[str, str]] = []
        self.errors: dict[str, list[str]] = {}  # what could not be found, by error

    def problem(self, what: str, mend: str) -> None:
        self._problems.append({"what": what, "mend": mend})

    @property
    def problems(self) -> list[dict[str, str]]:
        """The problems in words, one for each error."""
        failed = [
            {"what": f"{error} (not found: {', '.join(dict.fromkeys(facts))})", "mend": MEND_ERROR}
            for error, facts in self.errors.items()
        ]
        return self._problems + failed

    def module(self, name: str, mend: str) -> ModuleType | None:
        """Import a module; None, and a problem, if that fails."""
        try:
            return importlib.import_module(name)
        except BROKEN as error:
            self.problem(f"{name} does not import: {described(error)}", mend)
            return None

    def fact(self, what: str, find: Callable[[], Any], default: Any = None) -> Any:
        """The result of ``find``; the default, and a problem, if it raises."""
        try:
            return find()
        except Unavailable:
            return default
        except BROKEN as error:
            self.errors.setdefault(described(error), []).append(what)
            return default

    def facts(self, what: str, **finders: Callable[[], Any]) -> dict[str, Any]:
        """One ``fact`` for each name; None for a fact that cannot be found."""
        return {key: self.fact(f"{what}: {key}", find) for key, find in finders.items()}


def described(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {machine.first_line(error)}"


class Modules:
    """torch and the modules of ghost_ops that have facts; using one that is missing raises."""

    def __init__(self, found: Findings) -> None:
        self._torch = found.module("torch", INSTALL_TORCH)
        self._backends: ModuleType | None = None
        if self._torch is None:
            return
        try:
            torch_version.check()
        except ImportError as error:
            found.problem(str(error), INSTALL_TORCH)
        else:
            self._backends = found.module(f"{ROOT}.backends", INSTALL_AGAIN)

    @property
    def torch(self) -> Any:
        return _there(self._torch)

    @property
    def backends(self) -> Any:
        return _there(self._backends)


def _there(module: ModuleType | None) -> ModuleType:
    if module is None:
        raise Unavailable
    return module


def collect(selftest: bool = False) -> dict[str, Any]:
    """The content of the report, as data for JSON; the keys are always the same.

    Wrong values of variables are reported and then removed from ``os.environ``.

    Args:
        selftest: run the self-test too.
    """
    found = Findings()
    variables = _variables()
    for name, error in environment.wrong_values().items():
        read_at_import = name in variables and variables[name]["read_at"] != "build"
        found.problem(error, RESET if read_at_import else BEFORE_A_BUILD)
        del os.environ[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        modules = Modules(found)
        found.fact("native CPU library", lambda: _load_native(found, modules))
        info = {
            "versions": _versions(found, modules),
            "package": _package(found),
            "libraries": _libraries(found, modules),
            "build": found.fact("record of the build", lambda: _build(modules), {}),
            "instruction_sets": _instruction_sets(found, modules),
            "processor": found.fact("processor", machine.processor),
            "threads": _threads(found, modules),
            "allocator": found.fact("allocator", machine.allocator),
            "gpu": _gpu(found, modules),
            "nvcc": found.fact("nvcc", machine.nvcc),
            "requested_backend": found.fact(
                "requested backend", lambda: modules.backends.requested()
            ),
            "backends": found.fact("backends", lambda: _backends(found, modules), []),
            "environment": variables,
            "other_variables": machine.variables(),
            "selftest": None,
        }
        _judge(found, info)
        if selftest:
            info["selftest"] = found.fact("self-test", lambda: _selftest(modules), [])
    hints = found.fact("hints", lambda: _hints(info), [])
    texts = dict.fromkeys(f"{w.category.__name__}: {machine.first_line(w.message)}" for w in caught)
    return {"problems": found.problems, "hints": hints, "warnings": list(texts), **info}


def exit_status(info: dict[str, Any]) -> int:
    """1 if there is a problem, or a failed check of the self-test; else 0."""
    failed = any(check["status"] == "FAILED" for check in info["selftest"] or ())
    return int(bool(info["problems"]) or failed)


def _selftest(modules: Modules) -> list[dict[str, Any]]:
    try:
        _ = modules.backends
    except Unavailable:
        check = {"engine": "every backend", "what": "all checks", "status": "skipped"}
        return [{**check, "detail": WITHOUT_PACKAGE, "seconds": 0.0}]
    return importlib.import_module(f"{__package__}.selftest").run()


# --- ghost_ops --------------------------------------------------------------------------------


def _variables() -> dict[str, dict[str, Any]]:
    return {
        variable.name: {
            "value": os.environ.get(variable.name, ""),
            "default": variable.default,
            "allowed": list(variable.choices),
            "read_at": variable.read_at,
            "meaning": variable.meaning,
        }
        for variable in environment.VARIABLES
    }


def _load_native(found: Findings, modules: Modules) -> None:
    """Load the CPU library, without the requested instruction set if the processor lacks it."""
    native = modules.backends.native
    try:
        native.load()
    except (RuntimeError, ValueError) as error:
        if not os.environ.pop(environment.CPU_ISA.name, ""):
            raise
        found.problem(str(error), RESET)
        native.load()


def _versions(found: Findings, modules: Modules) -> dict[str, Any]:
    return found.facts(
        "version",
        ghost_ops=lambda: __version__,
        torch=lambda: str(modules.torch.__version__),
        python=platform.python_version,
        platform=platform.platform,
    )


def _package(found: Findings) -> dict[str, Any]:
    return {
        "path": str(PACKAGE),
        "kind": found.fact("kind of installation", _kind, "unknown"),
        "note": found.fact("other copies of the package", lambda: checkout.note(ROOT)),
    }


def _kind() -> str:
    for distribution in importlib.metadata.distributions(name="ghost_ops"):
        source = _editable_source(distribution)
        if source is not None and PACKAGE.is_relative_to(source):
            return f"editable installation of {source}"
    for parent in (PACKAGE.parent, PACKAGE.parent.parent):
        if (parent / "setup.py").exists() and (parent / "csrc").exists():
            return "checkout"
    for distribution in importlib.metadata.distributions(name="ghost_ops"):
        if Path(str(distribution.locate_file("ghost_ops"))).resolve() == PACKAGE:
            return "installed"
    return "folder without an installation"


def _editable_source(distribution: importlib.metadata.Distribution) -> Path | None:
    try:
        record = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return None
    if not record.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlsplit(record["url"]).path)).resolve()


def _libraries(found: Findings, modules: Modules) -> dict[str, Any]:
    def cpu_path() -> str | None:
        native = modules.backends.native
        if native.load():
            return native.library().__file__
        spec = importlib.util.find_spec(f"{ROOT}._C")
        return None if spec is None else spec.origin

    def cuda_path() -> str | None:
        path = modules.backends.cuda.PATH
        return str(path) if path.exists() else None

    def triton_path() -> str | None:
        spec = importlib.util.find_spec("triton")
        return None if spec is None else spec.origin

    paths = {"cpu": cpu_path, "cuda": cuda_path, "triton": triton_path}
    modules_of = {"cpu": "native", "cuda": "cuda", "triton": "triton"}
    return {name: _library(found, modules, modules_of[name], paths[name]) for name in paths}


def _library(
    found: Findings, modules: Modules, module: str, find_path: Callable[[], str | None]
) -> dict[str, Any]:
    path = found.fact(f"file of {module}", find_path)
    stat = found.fact(f"file of {module}", lambda: Path(path).stat() if path else None)
    is_library = stat is not None and module != "triton"  # Triton is a package of many files
    date = datetime.datetime.fromtimestamp(stat.st_mtime) if is_library else None
    try:
        backend = getattr(modules.backends, module)
        loaded, reason = backend.load(), backend.reason()
    except Unavailable:
        loaded, reason = False, WITHOUT_PACKAGE
    except BROKEN as error:
        loaded, reason = False, described(error)
    return {
        "path": path,
        "bytes": stat.st_size if is_library else None,
        "date": date.isoformat(" ", "minutes") if date else None,
        "loaded": loaded,
        "reason": reason,
    }


def _build(modules: Modules) -> dict[str, str]:
    """What the native library and the record of the build say of the build."""
    native = modules.backends.native
    info = native.library().build_info() if native.load() else {}
    return {str(key): str(value) for key, value in {**info, **build_record.read()}.items()}


def _instruction_sets(found: Findings, modules: Modules) -> dict[str, Any]:
    def library() -> Any:
        native = modules.backends.native
        if not native.load():
            raise Unavailable
        return native.library()

    def why() -> str:
        library()
        requested = environment.CPU_ISA.get()
        if requested != "auto":
            return f"{environment.CPU_ISA.name}={requested}"
        return "the widest that the processor and the build have"

    return {
        "available": found.fact("instruction sets", lambda: list(library().available_isas()), []),
        **found.facts(
            "instruction sets",
            chosen=lambda: library().isa(),
            why=why,
            torch=lambda: modules.torch.backends.cpu.get_cpu_capability(),
            onednn=lambda: _onednn(modules.torch),
        ),
    }


def _onednn(torch: Any) -> str | None:
    """Version and instruction set of PyTorch's oneDNN, from the header of its verbose output."""
    mkldnn = torch.backends.mkldnn
    if not mkldnn.is_available():
        return None
    with captured_output() as read, mkldnn.verbose(mkldnn.VERBOSE_ON):
        # Large enough that PyTorch takes oneDNN for it.
        torch.nn.functional.conv2d(torch.ones(4, 16, 32, 32), torch.ones(16, 16, 3, 3))
        text = read()
    isa = re.search(r",cpu,isa:(.*)", text)
    version = re.search(r"oneDNN (v[\d.]+)", text) or re.search(
        r"(?:oneDNN|MKL-DNN) (v[\d.]+)", torch.__config__.show()
    )
    names = ("oneDNN", version and version[1], isa and isa[1])
    return " ".join(name for name in names if name)


@contextlib.contextmanager
def captured_output() -> Iterator[Callable[[], str]]:
    """Sends the process's standard output to a file; the value reads what C libraries printed."""

    def flush() -> None:
        if sys.stdout is not None:
            sys.stdout.flush()
        with contextlib.suppress(Exception):  # not every system has fflush in the process itself
            importlib.import_module("ctypes").CDLL(None).fflush(None)

    flush()
    with _scratch_file() as file:
        before = os.dup(1)
        os.dup2(file.fileno(), 1)

        def read() -> str:
            flush()
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield read
        finally:
            flush()
            os.dup2(before, 1)
            os.close(before)


def _scratch_file() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError:  # no folder that can be written: the output is lost
        return open(os.devnull, "w+b")


# --- the process ------------------------------------------------------------------------------


def _threads(found: Findings, modules: Modules) -> dict[str, Any]:
    def usable() -> int:
        return machine.usable_cores(machine.affinity(), machine.cgroup_limit())

    return found.facts(
        "threads",
        torch=lambda: modules.torch.get_num_threads(),
        interop=lambda: modules.torch.get_num_interop_threads(),
        parallel_by=lambda: _parallel_backend(modules.torch),
        logical=os.cpu_count,
        affinity=lambda: len(machine.affinity()),
        physical=lambda: machine.physical_cores(machine.affinity()),
        cgroup_limit=machine.cgroup_limit,
        usable=usable,
    )


def _parallel_backend(torch: Any) -> str | None:
    match = re.search(r"ATen parallel backend: (.*)", torch.__config__.parallel_info())
    return match[1].strip() if match else None


# --- GPUs and backends ------------------------------------------------------------------------


def _gpu(found: Findings, modules: Modules) -> dict[str, Any]:
    driver = found.fact("driver", machine.driver)

    def cudnn() -> str | None:
        number = modules.torch.backends.cudnn.version()
        return None if number is None else str(number)

    facts = found.facts(
        "GPU",
        available=lambda: bool(modules.torch.cuda.is_available()),
        torch_cuda=lambda: modules.torch.version.cuda,
        torch_hip=lambda: modules.torch.version.hip,
        cudnn=cudnn,
        reason=lambda: _no_gpu(modules.torch, driver),
    )
    devices = found.fact("GPUs", lambda: _devices(modules.torch), [])
    return {**facts, "devices": devices, "driver": driver}


def _devices(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / (1 << 30), 1),
            }
        )
    return devices


def _no_gpu(torch: Any, driver: dict[str, Any] | None) -> str | None:
    """Why torch sees no GPU; None if it sees one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
        gpus = driver["gpus"] if driver else []
        return f"{reason}; install a CUDA build of PyTorch for {gpus[0]}" if gpus else reason
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs, if there are any"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"{described(error)}; {driver['reason'] if driver else 'is there a driver?'}"
    return "torch finds none"


def _backends(found: Findings, modules: Modules) -> list[dict[str, Any]]:
    """The backend for each dtype of each device of this machine, and why not another."""
    available = found.fact("GPUs", lambda: bool(modules.torch.cuda.is_available()), False)
    rows: list[dict[str, Any]] = []
    for device in ("cpu", "cuda") if available else ("cpu",):
        find = functools.partial(_rows, modules, device)
        rows += found.fact(f"backends of {device}", find, _no_rows(device))
    return rows


def _rows(modules: Modules, device: str) -> list[dict[str, Any]]:
    rows = []
    for row in modules.backends.status((device,)):
        dtype = getattr(modules.torch, row.dtype)
        others = {}
        for name, backend in modules.backends.BACKENDS.items():
            try:
                ok, reason = backend.can_run(device, dtype)
            except BROKEN as error:
                ok, reason = False, described(error)
            if not ok and name not in (row.backend, modules.backends.requested()):
                others[name] = reason
        rows.append({**row._asdict(), "others": others})
    return rows


def _no_rows(device: str) -> list[dict[str, Any]]:
    dtypes = ("float32", "float64", "bfloat16", "float16")
    row = {"device": device, "backend": "unknown", "reason": "see the problems", "others": {}}
    return [{**row, "dtype": dtype} for dtype in dtypes]


# --- what follows from the facts --------------------------------------------------------------


def _judge(found: Findings, info: dict[str, Any]) -> None:
    """Add a problem for each request that cannot be met, and each library that does not load."""
    requested = info["requested_backend"]
    rows = info["backends"]
    if rows and requested != "auto" and all(row["backend"] == "none" for row in rows):
        found.problem(
            f"{environment.BACKEND.name}={requested} cannot run here: {rows[0]['reason']}",
            f"do what the reason says, or set {environment.BACKEND.name}=auto",
        )
    cache = info["environment"][environment.CACHE_DIR.name]["value"]
    if cache and not _can_be_written(Path(cache).expanduser()):
        found.problem(
            f"{environment.CACHE_DIR.name}={cache!r} is not a folder that can be written",
            "name another folder, or unset it; autotuning starts anew in each process",
        )
    for name, library in info["libraries"].items():
        wanted = name == "cpu" or (name == "cuda" and info["gpu"]["available"])
        is_new = library["reason"] not in found.errors
        if wanted and library["path"] and not library["loaded"] and is_new:
            found.problem(f"{library['path']} is not loaded: {library['reason']}", INSTALL_AGAIN)


def _can_be_written(folder: Path) -> bool:
    """Whether the folder is one, or can be made, and takes files."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _hints(info: dict[str, Any]) -> list[str]:
    """What is allowed and costs speed or is easily overlooked, each with the mend."""
    hints = []
    package, threads, allocator = info["package"], info["threads"], info["allocator"]
    if package["note"]:
        hints.append(package["note"])
    library = info["libraries"]["cpu"]["path"]
    if library and Path(library).resolve().parent != PACKAGE:
        hints.append(
            f"the CPU library {library} belongs to another copy of ghost_ops than the package "
            f"{PACKAGE}: uninstall one of the two"
        )
    if threads["torch"] and threads["usable"] and threads["torch"] > threads["usable"]:
        usable = threads["usable"]
        hints.append(
            f"torch runs {threads['torch']} threads and this process may use {usable} cores: set "
            f"OMP_NUM_THREADS={usable}, or call torch.set_num_threads({usable})."
        )
    if allocator and allocator["name"].startswith("glibc") and not allocator["settings"]:
        hints.append(
            "glibc's allocator with its default settings maps large outputs anew at each call, "
            "which costs page faults at large batches: set MALLOC_MMAP_THRESHOLD_=1073741824 "
            "MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864, or preload tcmalloc or "
            "jemalloc (LD_PRELOAD)."
        )
    return hints
