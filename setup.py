"""Builds the native libraries of ghost_ops with ninja; everything else stands in pyproject.toml.

``ghost_ops/_C``        CPU kernels, operator registrations and the pybind11 view of the plan.
``ghost_ops/_cuda.so``  CUDA kernels and their registrations, if nvcc is found. No Python ABI in it.

torch.utils.cpp_extension is not used for the compilation: it refuses CUDA sources on a CPU-only
torch, and gives every file the same flags and include paths. Here each folder of csrc/ sees only
what it may know of: csrc/core, csrc/cpu and csrc/cuda are compiled without the torch headers.

One compiled library serves every torch >= 2.10, because only the LibTorch Stable ABI is used.
Only csrc/python is compiled once for each Python; its objects have folders of their own.

A release build has SOURCE_DATE_EPOCH set: the same bytes from any folder, GPU code compressed, no
symbol table. Every path that a compiler sees is relative to this folder for that reason.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from build_backend import (  # noqa: E402
    cuda_root,
    decide,
    env,
    fail,
    find_cxx,
    find_nvcc,
    is_writable,
    torch_version,
)

CSRC = ROOT / "csrc"
TORCH_TARGET_VERSION = "0x020a000000000000"  # LibTorch Stable ABI of torch 2.10
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
IS_MACOS = sys.platform == "darwin"
IS_RELEASE = "SOURCE_DATE_EPOCH" in os.environ

# -ffp-contract=fast lets the compiler form fused multiply-adds. -ffast-math stays out: NaN and Inf
# must travel through the kernels as they do through torch. -O2 with the loop passes of -O3 that the
# kernels gain from: the rest of -O3 doubles the time of the build for 3% in a few shapes at most.
CXX_FLAGS = (
    "-std=c++17 -O2 -fpeel-loops -ftree-loop-vectorize -fvect-cost-model=dynamic -DNDEBUG -fPIC "
    "-fvisibility=hidden -fvisibility-inlines-hidden -pthread -ffp-contract=fast -fno-math-errno "
    "-fno-trapping-math -Wall -Wextra -Wno-ignored-optimization-argument"
).split()
# Every source in csrc/cpu/isa is compiled once for each of these; off x86 for "generic" alone.
ISA_FLAGS: dict[str, list[str]] = {
    "generic": [],
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "avx512": (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512 "
        # GCC 12 takes the deliberately undefined registers of its own intrinsics for a mistake.
        "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"
    ).split(),
}
if not IS_X86:
    ISA_FLAGS = {"generic": []}


def find_packages() -> tuple[Path, str, str]:
    """Folder of torch, include folder of pybind11, path of ninja; all of them from packages."""
    howto = (
        "`pip install .` brings it along; for a build without isolation: pip install "
        f"'{torch_version.REQUIREMENT}' ninja pybind11 'setuptools>=77'"
    )
    torch = DECISION and DECISION.torch
    if torch is None:
        fail(f"building the native libraries needs torch, which is missing. {howto}")
    try:
        from pybind11 import get_include

        pybind11_include = get_include()
    except ImportError:
        pybind11_include = str(torch.root / "include")  # torch ships a copy
    try:
        from ninja import BIN_DIR

        ninja = str(Path(BIN_DIR) / "ninja")
    except ImportError:
        ninja = shutil.which("ninja") or fail(f"ninja was not found. {howto}")
    return torch.root, pybind11_include, ninja


# ---------------------------------------------------------------- the sources


def sources(*patterns: str) -> list[str]:
    """Sources relative to ROOT."""
    files = sorted(path for pattern in patterns for path in CSRC.glob(pattern))
    return [path.relative_to(ROOT).as_posix() for path in files]


def extensions() -> list[Extension]:
    found = []
    if DECISION and DECISION.cpu is None:
        found.append(
            Extension(
                "ghost_ops._C",
                sources("core/*.cpp", "cpu/**/*.cpp", "torch/*.cpp", "python/*.cpp"),
            )
        )
    if DECISION and DECISION.cuda is None:
        found.append(
            Extension(
                "ghost_ops._cuda",
                sources("core/*.cpp", "cuda/*.cpp", "cuda/**/*.cu", "torch/cuda/*.cpp"),
            )
        )
    return found


# ---------------------------------------------------------------- the build


def write_record(folder: Path, in_place: bool) -> None:
    """Write what was built, and why not more, to be read by ghost_ops/build_record.py."""
    if DECISION is None:
        return
    record, path = DECISION.record(), folder / "build_record.json"
    if in_place:
        # A library of an earlier build stays in the checkout, and so does what is known of it.
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for library, files in (("cpu", "_C*.so"), ("cuda", "_cuda.so")):
            if record[library] != "built" and any(folder.glob(files)):
                record = {**old, **record, library: "built"}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class BuildPy(build_py):
    """Copies the Python files and writes the record."""

    def run(self) -> None:
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "ghost_ops"
        if not self.editable_mode:
            # A file of an earlier build that has left the sources must not slip into the wheel.
            for path in target.rglob("*.py"):
                path.unlink()
        super().run()
        write_record(target, in_place=self.editable_mode)


def join(arguments: list[str]) -> str:
    """Shell-quoted command text for a ninja file, where $ is special."""
    return " ".join(shlex.quote(str(argument)) for argument in arguments).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", path.as_posix())


def point_link(link: Path, target: Path) -> None:
    """Make ``link`` a symbolic link to ``target``, in one step: another build may use it now."""
    if not link.is_symlink() or link.readlink() != target:
        new = link.with_name(f"{link.name}.{os.getpid()}")
        new.symlink_to(target)
        new.replace(link)


def gencode_flags(archs: str, since: int = 0) -> list[str]:
    """'8.0 9.0a 9.0+PTX' -> the -gencode arguments of nvcc.

    The sources use nothing that the oldest of these lacks: its intermediate code serves all of them
    (those with a suffix have their own), which takes a third off the time of the build. A source
    that does, from architecture ``since`` on, has that one's code for it and all newer ones.
    """
    entries = []
    for arch in archs.replace(";", " ").replace(",", " ").split():
        if (match := re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)) is None:
            fail(f"{env.CUDA_ARCHS.name}: expected entries like 8.0, 9.0a or 9.0+PTX, got {arch!r}")
        entries.append((match[1] + match[2], match[3], match[4]))
    oldest = min((number for number, suffix, _ in entries if not suffix), key=int, default="")
    flags = []
    for number, suffix, ptx in entries:
        own = since if 0 < since <= int(number) else oldest
        virtual = number + suffix if suffix else str(own)
        flags += ["-gencode", f"arch=compute_{virtual},code=sm_{number}{suffix}"]
        if ptx:
            flags += ["-gencode", f"arch=compute_{virtual},code=compute_{virtual}"]
    return flags


def release_nvcc_flags(source: Path) -> list[str]:
    """Flags of a release (nvcc >= 12.8): small, and no trace of the process or the folder.

    nvcc hashes the absolute path of a source into the names of its anonymous namespaces, and has no
    documented option against it: these two replace the path in the front ends of host and device.
    """
    path = f"--orig_src_path_name={source.as_posix()}"
    seed = f"-frandom-seed={source.as_posix()}"
    return ["-compress-mode=size", seed, "-Xcudafe", path, "-Xcicc", path]


class NinjaBuildExt(build_ext):
    """Writes one build.ninja a library and runs it; only what changed is compiled again."""

    def run(self) -> None:
        # A library of an earlier build that is switched off now must not slip into the wheel.
        current = {self.get_ext_filename(ext.name) for ext in self.extensions}
        for name in ("ghost_ops._C", "ghost_ops._cuda"):
            if (filename := self.get_ext_filename(name)) not in current:
                (Path(self.build_lib) / filename).unlink(missing_ok=True)
        super().run()
        if self.inplace:
            write_record(ROOT / "ghost_ops", in_place=True)

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_cuda"):  # loaded by torch, not by Python's import
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        torch_root, self.pybind11_include, ninja = find_packages()
        self.cuda_root = cuda_root(find_nvcc()) if ext.name.endswith("_cuda") else None

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder for each set of architectures: building for another keeps the objects of this.
        variant = "-".join([ext.name, *re.findall(r"\S+", env.CUDA_ARCHS.get())])
        build_dir = Path("build", "ninja", variant if self.cuda_root else ext.name)
        (ROOT / build_dir).mkdir(parents=True, exist_ok=True)
        # The compilers see torch under one name, or another Python's torch would compile it again.
        # Not "torch": the objects of csrc/torch have that folder.
        self.torch = build_dir / "torch-package"
        point_link(ROOT / self.torch, torch_root)
        library = ROOT / build_dir / output.name
        # One file for each Python, with one log of what is compiled (ninja's builddir).
        build_file = build_dir / f"{sys.implementation.cache_tag}.ninja"
        text = self.ninja_file(ext, build_dir, output.name)
        written = ROOT / build_file
        if not written.exists() or written.read_text(encoding="utf-8") != text:
            written.write_text(text, encoding="utf-8")

        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # On a terminal ninja keeps to one line; in a log it would write one for each file.
        options = ["-v"] if self.verbose > 1 else [] if sys.stdout.isatty() else ["--quiet"]
        time = "four minutes" if self.cuda_root else "a minute"
        print(f"ghost_ops: building {ext.name} with {jobs} jobs, {time} on two cores", flush=True)
        try:
            command = [ninja, "-f", str(build_file), "-j", jobs, *options]
            subprocess.run(command, check=True, cwd=ROOT)
        except subprocess.CalledProcessError:
            switch = env.BUILD_CUDA if self.cuda_root else env.BUILD_CPU
            fail(
                f"compiling {ext.name} failed (the compiler's messages stand above). "
                f"{switch.name}=0 installs without this library."
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        if output != library:
            # A new file, not new content: a process that has the old one mapped goes on unharmed.
            output.unlink(missing_ok=True)
            shutil.copy2(library, output)

    def ninja_file(self, ext: Extension, build_dir: Path, library: str) -> str:
        """The text of a ninja file that runs in ROOT."""
        cxx = find_cxx()
        lines = [
            "ninja_required_version = 1.5",
            f"builddir = {ninja_path(build_dir)}",
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out",
            "  description = compile $label",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared $in -o $out {join(self.link_flags())}",
            "  description = link $out",
        ]
        if self.cuda_root:
            lines += [
                "rule nvcc",
                f"  command = {join([find_nvcc()])} -MD -MF $out.d $flags -c $in -o $out",
                "  description = compile $label",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        # Of an inline function that several objects define, the linker keeps the first: it must not
        # be one compiled with instructions that the processor may lack. Those objects come last.
        units = [
            (Path(source), isa)
            for isa in (None, *ISA_FLAGS)
            for source in ext.sources
            if (Path(source).parent.name == "isa") == (isa is not None)
        ]
        objects = {}
        for source, isa in units:
            suffix = f".{isa}{source.suffix}.o" if isa else f"{source.suffix}.o"
            folder = build_dir / source.parent.relative_to("csrc")
            if source.parts[1] == "python":
                folder /= sys.implementation.cache_tag
            objects[source, isa] = ninja_path(folder / f"{source.stem}{suffix}")
        # Ninja starts them in this order: the kernel tables, which take longest, first.
        for source, isa in sorted(units, key=lambda unit: unit[1] is None):
            rule, flags = "cxx", self.cxx_flags(source, isa)
            if source.suffix == ".cu":
                rule, flags = "nvcc", self.nvcc_flags(source)
            lines += [
                f"build {objects[source, isa]}: {rule} {ninja_path(source)}",
                f"  flags = {join(flags)}",
                f"  label = {source}{f' ({isa})' if isa else ''}",
            ]
        target = ninja_path(build_dir / library)
        lines += [f"build {target}: link {' '.join(objects.values())}", f"default {target}", ""]
        return "\n".join(lines)

    def cxx_flags(self, source: Path, isa: str | None) -> list[str]:
        """Flags of one C++ source: what it may include depends on its folder."""
        flags = [*CXX_FLAGS, "-Icsrc"]
        flags += [f"-DGHOST_OPS_HAVE_{name.upper()}" for name in ISA_FLAGS]
        if isa:
            flags += [f"-DGHOST_ISA={isa}", f'-DGHOST_ISA_NAME="{isa}"', *ISA_FLAGS[isa]]
        folder = source.parts[1]
        if folder == "torch":
            flags += self.torch_flags()
        elif folder == "python":
            flags += ["-isystem", self.pybind11_include]
            flags += ["-isystem", sysconfig.get_path("include")]
        if self.cuda_root and folder in ("torch", "cuda"):
            flags += ["-DUSE_CUDA", "-isystem", str(self.cuda_root / "include")]
        return flags + shlex.split(os.environ.get("CXXFLAGS", ""))

    def nvcc_flags(self, source: Path) -> list[str]:
        host = ["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
        return [
            *"-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden".split(),
            *host,
            "-Icsrc",
            *(release_nvcc_flags(source) if IS_RELEASE else []),
            *gencode_flags(env.CUDA_ARCHS.get(), 90 if source.stem.endswith("_sm90") else 0),
        ]

    def torch_flags(self) -> list[str]:
        include = self.torch / "include"
        return [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(include)]

    def link_flags(self) -> list[str]:
        flags = [f"-L{self.torch / 'lib'}"]
        if IS_RELEASE:
            flags += ["-Wl,-s"]
        if self.cuda_root:
            # A CUDA torch's libtorch pulls in libtorch_cuda, so a CPU-only torch is enough to link.
            # The linker is g++, because nvcc would reorder these.
            flags += "-Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed".split()
            # The CUDA runtime is part of the library and hidden in it, as in NCCL and cuBLAS: it
            # works beside the runtime of a torch for another CUDA, in torch's contexts and streams.
            flags += [f"-L{self.cuda_root / 'lib64'}", "-lcudart_static"]
            flags += "-Wl,--exclude-libs,libcudart_static.a -ldl -lrt -pthread".split()
        else:
            flags += ["-ltorch_cpu", "-pthread"]
        if IS_MACOS:
            flags += ["-undefined", "dynamic_lookup"]
        return flags + shlex.split(os.environ.get("LDFLAGS", ""))


# Only the commands that build look for compilers.
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
DECISION = decide() if BUILDING & set(sys.argv[1:]) else None
if DECISION and not is_writable(ROOT):
    fail(f"{ROOT} is read-only, and this command builds inside it: pip install .")
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuildExt, "build_py": BuildPy},
)
