"""The rooms of the source tree: who imports whom. ``python tests/test_rooms.py`` prints the graph.

A module imports modules of its own room and of lower rooms, without a cycle. Imports inside of
functions count; the Triton kernels, which are imported by name at the first call, do not.
"""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the lowest room to the highest: packages and modules of ghost_ops.
ROOMS = """_version torch_version environment build_record announce checkout activations conventions
modes backends ops sync reference autograd functional fusion nn convert models planner __init__
__main__""".split()
# The folders of csrc without torch, and the folders whose headers each includes.
CSRC = {"core": {"core"}, "cpu": {"core", "cpu"}, "cuda": {"core", "cuda"}}


def modules() -> dict[str, Path]:
    """The files by module, relative to ghost_ops: ``ops.define``, ``ops``, ``__init__``."""
    package = ROOT / "ghost_ops"
    files = {
        ".".join(p.relative_to(package).with_suffix("").parts): p for p in package.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): files[name] for name in sorted(files)}


MODULES = modules()


def read(module: str) -> tuple[set[str], list[str]]:
    """The modules that a module imports, and the private names of others that it uses."""
    path = MODULES[module]
    package = path.relative_to(ROOT).parts[:-1]
    nodes = list(ast.walk(ast.parse(path.read_text())))
    graph, private, bound = set(), [], set()
    for node in nodes:
        if not isinstance(node, ast.ImportFrom):
            assert not (isinstance(node, ast.Import) and node.names[0].name.startswith("ghost_ops"))
            continue
        parts = [*package[: len(package) - node.level + 1]] if node.level else []
        base = ".".join([*parts, *filter(None, [node.module])])
        if base.partition(".")[0] != "ghost_ops":
            continue
        for alias in node.names:
            found = f"{base}.{alias.name}".removeprefix("ghost_ops.")
            if found in MODULES:
                bound.add(alias.asname or alias.name)
            else:
                found = base.removeprefix("ghost_ops").removeprefix(".") or "__init__"
                private += [f"{found}.{alias.name}"] if re.match("_[^_]", alias.name) else []
            graph.add(found)
    for node in nodes:
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in bound:
            private += [f"{node.value.id}.{node.attr}"] if re.match("_[^_]", node.attr) else []
    return graph - {module}, [f"{module}: {name}" for name in private]


GRAPH = {module: read(module)[0] for module in MODULES}


def room(module: str) -> int:
    return ROOMS.index(module.partition(".")[0])


def test_no_import_goes_up() -> None:
    assert not {(a, b) for a, found in GRAPH.items() for b in found if room(b) > room(a)}


def test_no_cycle() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError


def test_no_private_name_crosses_a_file() -> None:
    assert not [name for module in MODULES for name in read(module)[1]]


def test_rooms_of_csrc() -> None:
    wrong = []
    for folder, allowed in CSRC.items():
        for path in (ROOT / "csrc" / folder).rglob("*.*"):
            for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.M):
                head = name.replace("../", "").partition("/")[0]
                if head in ("torch", "c10", "ATen") or (
                    head in ("core", "cpu", "cuda", "python") and head not in allowed
                ):
                    wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


if __name__ == "__main__":
    # An older tree, into whose tests/ this file is copied, has other rooms.
    ROOMS += sorted({module.partition(".")[0] for module in MODULES} - set(ROOMS))
    for module in sorted(MODULES, key=lambda m: (room(m), m)):
        print(f"{module:<36} {' '.join(sorted(GRAPH[module], key=lambda m: (room(m), m)))}")
