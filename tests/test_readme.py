"""Promise: README.md and docs/*.md run as written, and the commands in them exist.

A Python block runs in a fresh namespace and an empty folder. What it needs and this machine lacks
(a GPU, a package) skips it with the reason; it is compiled and its names are looked up in any case.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import ghost_ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.M | re.S)
GPU = "a GPU"
# What torchrun sets; port 0: any that is free.
ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    name: str  # file and line
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a page in their order."""
    source = page.read_text()
    for found in FENCE.finditer(source):
        indent, language, body = found.groups()
        line = source.count("\n", 0, found.start()) + 1
        yield Block(f"{page.name}:{line}", language, re.sub(f"^{indent}", "", body, flags=re.M))


BLOCKS = [block for page in PAGES for block in blocks(page)]
OTHERS = "deployment.md"  # its blocks are one program, which test_export.py runs
PYTHON = [b for b in BLOCKS if b.language == "python" and not b.name.startswith(OTHERS)]
LINES = [
    (block.name, line)
    for block in BLOCKS
    if block.language in ("", "sh", "bash")
    for line in re.sub(r"\\\n", " ", block.text).splitlines()
    if shlex.split(line, comments=True)
]


def imports(tree: ast.AST) -> set[str]:
    """The top-level packages that a block imports."""
    nodes = [*ast.walk(tree)]
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@functools.cache
def lacking(name: str) -> str | None:
    """Why this machine cannot run what needs ``name``, or None."""
    if name == GPU:
        return None if torch.cuda.is_available() else "it needs a GPU"
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    if name == "timm":
        from examples import third_party

        try:
            third_party.timm()
        except ImportError as error:
            return f"timm does not import here: {error}"
    return None


def undefined(tree: ast.AST) -> set[str]:
    """Names that are read and nowhere bound."""
    nodes = [*ast.walk(tree)]
    loaded = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {a.asname or a.name.partition(".")[0] for n in nodes for a in getattr(n, "names", [])}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    kinds = (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)
    bound |= {n.name for n in nodes if isinstance(n, kinds) and n.name}
    return loaded - bound - {*dir(builtins)}


def attributes(tree: ast.AST) -> set[str]:
    """Every dotted name that starts with ``ghost_ops``."""
    names = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return {name for name in names if re.fullmatch(r"ghost_ops(\.\w+)+", name)}


def test_there_are_blocks() -> None:
    """And the pattern misses none of them."""
    assert len(PYTHON) > 4
    assert sum(p.read_text().count("```") for p in PAGES) == 2 * len(BLOCKS)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_names(block: Block) -> None:
    tree = ast.parse(block.text, block.name)
    assert not undefined(tree)
    for name in attributes(tree):
        functools.reduce(getattr, name.split(".")[1:], ghost_ops)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = imports(ast.parse(block.text))
    needs |= {GPU} if ".cuda()" in block.text else set()
    for reason in filter(None, map(lacking, sorted(needs))):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    for name, value in ONE_PROCESS.items():
        monkeypatch.setenv(name, value)
    try:
        exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def extras() -> set[str]:
    """The extras of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    (table,) = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.M | re.S)
    return {*re.findall(r"^([\w-]+) = \[", table, re.M)}


def check_make(words: list[str]) -> None:
    """The targets exist; nothing is made."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    given = {word.partition("=")[0] for word in words}
    here = [f"PYTHON={sys.executable}", "VENV="]
    command = ["make", "-n", *words, *(w for w in here if w.partition("=")[0] not in given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_python(words: list[str]) -> None:
    """A module or script of this project starts: itself if it is quick, or with ``--help``."""
    if words[0] == "-m":
        module, *options = words[1:]
        command = ["-m", module]
        assert importlib.util.find_spec(module), f"no module {module}"
        if module == "benchmarks":
            command += options[:1]
    else:
        command, module = words[:1], words[0]
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"
    if module != "ghost_ops":
        command.append("--help")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in (word for word in words[2:] if word.startswith("--")):
        assert option in done.stdout, f"--help does not have {option}"


def check_pip(words: list[str]) -> None:
    """Requirements parse; extras of this package and files exist."""
    assert words[0] == "install"
    for word in words[1:]:
        if word.startswith("-"):
            assert word in ("-e", "-U", "-v", "--no-build-isolation", "--no-deps"), word
            continue
        name, _, named = word.rstrip("]").partition("[")
        if name in (".", "ghost_ops"):
            assert {*filter(None, named.split(","))} <= extras(), word
        elif name.endswith((".whl", ".txt")):
            continue
        else:
            Requirement(word)


def check_git(words: list[str]) -> None:
    """The repository is the one of pyproject.toml."""
    assert words[:1] == ["clone"]
    assert f'Repository = "{words[1]}"' in (ROOT / "pyproject.toml").read_text()


COMMANDS = {"make": check_make, "python": check_python, "pip": check_pip, "git": check_git}


@pytest.mark.parametrize(("name", "line"), LINES, ids=[f"{n} {line[:40]}" for n, line in LINES])
def test_shell(name: str, line: str) -> None:
    for command in line.split("&&"):
        words = shlex.split(command, comments=True)
        while "=" in words[0]:  # variables before a command
            del words[0]
        if words[0] == "torchrun":  # its options, one of which has a value, come first
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            words = ["python", *words[script:]]
        if words[0] != "cd":
            assert words[0] in COMMANDS, f"{name}: {words[0]} is no command that is checked"
            COMMANDS[words[0]](words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_and_modules(page: Path) -> None:
    """Those that the text names."""
    text = re.sub(r"\s+", " ", page.read_text())
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert module in ("build", "pip") or importlib.util.find_spec(module), module
    for option in re.findall(r'pip install "?(?:\.|ghost_ops)\[([\w,-]+)\]', text):
        assert {*option.split(",")} <= extras(), option
