"""A checkout in which nothing was built gives way to an installed ghost_ops.

Python looks into the current folder first: inside the checkout, ``import ghost_ops`` would find the
sources, without compiled libraries, before the installed package. This file needs no torch.
"""

from __future__ import annotations

import filecmp
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path


def hand_over(name: str) -> bool:
    """Put the installed package into ``sys.modules[name]`` if it has to run instead of this one.

    That is so where this package lies in a checkout without a CPU library built in place, where
    PYTHONPATH does not name the checkout, and where another copy is installed. If its Python files
    differ from those of the checkout, a warning names both.

    Args:
        name: the package that is being imported, ``"ghost_ops"``.

    Returns:
        Whether another copy was imported.
    """
    bare = sys.modules[name]
    own = bare.__spec__
    if own is None or own.loader_state is not None:
        return False
    package = _folder(own)
    if not _is_bare_checkout(package) or _in_pythonpath(package.parent):
        return False
    others = _others(name, package)
    spec = next((spec for spec in others if not _is_bare_checkout(_folder(spec))), None)
    if spec is None or spec.loader is None:
        return False
    for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[key]
    spec.loader_state = str(package)  # tells the installed package what was passed over
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec._initializing = True  # type: ignore[attr-defined]  # other threads wait, as in any import
    try:
        spec.loader.exec_module(module)
    finally:
        spec._initializing = False  # type: ignore[attr-defined]
    vars(bare).update(vars(module))  # a thread that waited for this import has the bare module
    if _differ(package, _folder(spec)):
        from .announce import warn_once

        warn_once(
            f"the installed ghost_ops in {_folder(spec)} runs, not the checkout in "
            f"{package.parent}, whose files differ and in which nothing was built: `pip install .` "
            "there installs them, `pip install -e .` runs them from there",
            stacklevel=3,
        )
    return True


def note(name: str = "ghost_ops") -> str | None:
    """One line about a second copy of the package on ``sys.path``; None if there is none."""
    own = sys.modules[name].__spec__
    if own is None:
        return None
    package = _folder(own)
    if own.loader_state is not None:
        checkout = Path(own.loader_state)
        differs = ", whose files differ" if _differ(checkout, package) else ""
        return (
            f"the installed package {package} runs; the checkout {checkout.parent}{differs}, in "
            "which nothing was built, does not"
        )
    folders = dict.fromkeys(_folder(spec) for spec in _others(name, package))
    if not folders:
        return None
    others = ", ".join(f"{folder} ({_version(folder)})" for folder in folders)
    return f"{package} ({_version(package)}) runs; there is also {others}, later on sys.path"


def _is_bare_checkout(package: Path) -> bool:
    """Whether a package lies beside its sources, without a CPU library for this Python."""
    return (
        (package.parent / "setup.py").is_file()
        and (package.parent / "csrc").is_dir()
        and not any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
    )


def _in_pythonpath(folder: Path) -> bool:
    entries = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return any(Path(entry).resolve() == folder for entry in entries)


def _others(name: str, package: Path) -> Iterator[ModuleSpec]:
    """Other copies of a package: of each entry of ``sys.path``, and of editable installations."""
    for finder in sys.meta_path:
        # An editable installation can be a finder of its own, which takes no path.
        paths = [[entry] for entry in sys.path] if finder is PathFinder else [None]
        for path in paths:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path) if find_spec else None
            if spec and spec.loader and spec.origin and _folder(spec) != package:
                yield spec


def _folder(spec: ModuleSpec) -> Path:
    return Path(str(spec.origin)).resolve().parent


def _differ(one: Path, other: Path) -> bool:
    """Whether two copies have other Python files, or files of other content."""
    names = [{path.relative_to(root) for path in root.rglob("*.py")} for root in (one, other)]
    return names[0] != names[1] or not all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names[0]
    )


def _version(package: Path) -> str:
    try:
        text = (package / "_version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r'__version__ = "(.+)"', text)
    return found[1] if found else "of unknown version"
