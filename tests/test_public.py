"""Promise: public names are documented, and nothing else shows."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ghost_ops


def public_modules(module: ModuleType) -> Iterator[ModuleType]:
    """A module and the modules that its ``__all__`` names, at any depth."""
    yield module
    for name in module.__all__:
        found = getattr(module, name)
        if isinstance(found, ModuleType):
            yield from public_modules(found)


MODULES = {module.__name__: module for module in public_modules(ghost_ops)}
NAMES = {
    f"{path}.{name}": getattr(module, name)
    for path, module in MODULES.items()
    for name in module.__all__
    if not isinstance(getattr(module, name), ModuleType)
}


@functools.cache
def documented_constants() -> set[str]:
    """Names that a file of the package assigns, with a docstring on the next line."""
    found = set()
    for path in Path(ghost_ops.__path__[0]).rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for statement, following in itertools.pairwise(body):
            value = getattr(following, "value", None)
            if isinstance(statement, ast.Assign) and isinstance(value, ast.Constant):
                found |= {t.id for t in statement.targets if isinstance(t, ast.Name)}
    return found


def members(kind: type) -> dict[str, Any]:
    """The public methods and properties that classes of ghost_ops give to a class."""
    return {
        name: inspect.getattr_static(kind, name)
        for base in kind.__mro__
        if base.__module__.startswith("ghost_ops")
        for name, value in vars(base).items()
        if not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
    }


def test_the_modules() -> None:
    found = {path.partition(".")[2] for path in MODULES}
    assert found == {"", *"activations backends functional models planner reference".split()}


@pytest.mark.parametrize("path", MODULES)
def test_all_is_right(path: str) -> None:
    module = MODULES[path]
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert not name.startswith("_"), name
        origin = inspect.getmodule(found := getattr(module, name))
        inside = origin is None or origin.__name__.startswith("ghost_ops")
        assert inside or name in vars(module), f"{name} is of {origin}"
        assert not isinstance(found, ModuleType) or module is ghost_ops, name
    assert module.__doc__


@pytest.mark.parametrize("path", NAMES)
def test_docstring(path: str) -> None:
    """A docstring for each name; it names each argument, and each member without a docstring."""
    value = NAMES[path]
    if not (inspect.isroutine(value) or inspect.isclass(value)):
        assert path.rpartition(".")[2] in documented_constants()
        return
    text = value.__doc__
    assert text
    for name in inspect.signature(value).parameters:
        assert name in text or name in ("_", "args", "kwargs"), name
    for name, member in members(value).items() if inspect.isclass(value) else ():
        assert inspect.getdoc(member) or name in text, name


def test_dir_shows_public_names_only() -> None:
    assert dir(ghost_ops) == sorted([*ghost_ops.__all__, "__version__"])
    assert ghost_ops.ops  # hidden, not gone


def test_star_import() -> None:
    namespace: dict[str, Any] = {}
    exec("from ghost_ops import *", namespace)
    del namespace["__builtins__"]
    assert set(namespace) == set(ghost_ops.__all__)
    assert not set(namespace) & set(dir(builtins))


def test_pages(tmp_path: Path) -> None:
    """`make docs` writes a page for each public module; it shows the public names only."""
    pytest.importorskip("pdoc")
    makefile = Path(__file__).resolve().parents[1] / "Makefile"
    patterns = re.search(r"^PUBLIC = (.*)$", makefile.read_text(), re.M)
    assert patterns
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--no-show-source"]
    command += ["--output-directory", str(tmp_path), *shlex.split(patterns[1])]
    subprocess.run(command, check=True, capture_output=True)
    pages = {
        ".".join(page.relative_to(tmp_path).with_suffix("").parts): page.read_text()
        for page in tmp_path.rglob("*.html")
    }
    assert pages.keys() - {"index"} == MODULES.keys()
    for path, module in MODULES.items():
        shown = set(re.findall(r'<section id="(\w+)"', pages[path]))
        assert shown == {
            name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)
        }
