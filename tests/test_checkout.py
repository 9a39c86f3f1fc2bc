"""A checkout in which nothing was built gives way to an installed package, and to nothing else.

The packages here are small and need no torch: the file ``checkout.py`` of ghost_ops, and a name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import ghost_ops
from ghost_ops import checkout as hand_over_module

INIT = """
from .checkout import hand_over
if not hand_over(__name__):
    from . import planner
    WHO = {who!r}
"""
PLANNER = "WHO = {who!r}\nclass Plan:\n    def __reduce__(self): return (Plan, ())\n"
MAIN = "from . import WHO\nprint('main', WHO)\n"
ANNOUNCE = """
import warnings
def warn_once(text, stacklevel): warnings.warn(text, UserWarning, stacklevel=stacklevel + 1)
"""


def package(folder: Path, who: str = "same") -> Path:
    """A package ghost_ops in a folder; two packages of the same ``who`` have the same files."""
    target = folder / "ghost_ops"
    target.mkdir(parents=True)
    shutil.copy(hand_over_module.__file__, target / "checkout.py")
    texts = {"__init__": INIT, "planner": PLANNER, "__main__": MAIN, "announce": ANNOUNCE}
    for name, text in texts.items():
        (target / f"{name}.py").write_text(text.replace("{who!r}", repr(who)))
    (target / "_version.py").write_text('__version__ = "1.2"\n')
    return folder


def checkout(folder: Path, who: str = "same") -> Path:
    package(folder, who)
    (folder / "setup.py").touch()
    (folder / "csrc").mkdir()
    return folder


def python(*arguments: str, cwd: Path, path: str | Path = "", flags: str = "-SB") -> list[str]:
    """The last lines that Python prints; ``path`` is PYTHONPATH. -S: no packages of this Python."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, flags, *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines()


WHO = "import ghost_ops; print(ghost_ops.WHO)"
WHERE = "import ghost_ops; print(ghost_ops.__file__)"


def file_of(folder: Path) -> list[str]:
    return [str(folder / "ghost_ops" / "__init__.py")]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return checkout(tmp_path / "a check\u00f6ut")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return package(tmp_path / "site p\u00e4ckages")


USES = [
    (("-c", WHERE), None),
    (("-c", "import ghost_ops.planner; " + WHERE), None),
    (("-c", "from ghost_ops.planner import Plan; " + WHERE), None),
    (("-c", "import sys; sys.path[0] = '.'; " + WHERE), None),
    (("-c", "import os, sys; sys.path[0] = os.getcwd() + '/csrc/..'; " + WHERE), None),
    (("-c", "import importlib, ghost_ops; importlib.reload(ghost_ops); " + WHERE), None),
    (("-m", "ghost_ops"), ["main same"]),
    (
        (
            "-c",
            "import pickle, ghost_ops.planner as p; q = pickle.loads(pickle.dumps(p.Plan()));"
            "print(type(q) is p.Plan)",
        ),
        ["True"],
    ),
    (
        (
            "-c",
            "from threading import Thread\n"
            "def run():\n import ghost_ops\n print(ghost_ops.WHO)\n"
            "both = [Thread(target=run) for _ in range(2)]\n"
            "[t.start() for t in both]; [t.join() for t in both]",
        ),
        ["same", "same"],
    ),
]


@pytest.mark.parametrize(("arguments", "printed"), USES)
def test_an_installed_package_runs_inside_the_checkout(
    arguments: tuple[str, ...], printed: list[str] | None, here: Path, site: Path
) -> None:
    assert python(*arguments, cwd=here, path=site) == (printed or file_of(site))


def test_processes_started_inside_the_checkout(here: Path, site: Path) -> None:
    (here / "work.py").write_text(
        "import multiprocessing, ghost_ops.planner as p\n"
        "def where(plan): return type(plan) is p.Plan and p.__file__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(where, (p.Plan(),)))\n"
    )
    assert python("work.py", cwd=here, path=site) == [str(site / "ghost_ops" / "planner.py")]


LIBRARY = f"_C{EXTENSION_SUFFIXES[0]}"


def test_a_checkout_with_a_library_runs_itself(here: Path, site: Path) -> None:
    (here / "ghost_ops" / LIBRARY).touch()
    assert python("-c", WHERE, cwd=here, path=site) == file_of(here)


def test_a_library_for_another_python_does_not_count(here: Path, site: Path) -> None:
    for name in ("_C.cpython-27-x.so", "_cuda.so"):
        (here / "ghost_ops" / name).touch()
    assert python("-c", WHERE, cwd=here, path=site) == file_of(site)


def test_a_checkout_runs_itself_if_nothing_is_installed(here: Path, tmp_path: Path) -> None:
    namespace = tmp_path / "namespace"
    (namespace / "ghost_ops").mkdir(parents=True)
    for path in ("", tmp_path / "nowhere", namespace):
        assert python("-c", WHERE, cwd=here, path=path) == file_of(here)


def test_a_checkout_in_pythonpath_runs_itself(here: Path, site: Path) -> None:
    both = os.pathsep.join(map(str, (here, site)))
    assert python("-c", WHERE, cwd=here, path=both) == file_of(here)


def test_a_package_outside_of_a_checkout_runs_itself(site: Path, tmp_path: Path) -> None:
    other = package(tmp_path / "other")
    assert python("-c", WHERE, cwd=site, path=other) == file_of(site)


def test_another_bare_checkout_is_no_installation(here: Path, tmp_path: Path) -> None:
    other = checkout(tmp_path / "other")
    assert python("-c", WHERE, cwd=here, path=other) == file_of(here)
    (other / "ghost_ops" / LIBRARY).touch()
    assert python("-c", WHERE, cwd=here, path=other) == file_of(other)


def test_a_link_to_the_checkout_is_the_checkout(here: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "ghost_ops").symlink_to(here / "ghost_ops")
    assert python("-c", WHERE, cwd=here, path=tmp_path / "linked") == file_of(here)


def test_a_zip_file(here: Path, site: Path, tmp_path: Path) -> None:
    archive = tmp_path / "packages.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (site / "ghost_ops").iterdir():
            file.write(path, f"ghost_ops/{path.name}")
    said = python("-c", WHERE, cwd=here, path=archive)
    assert said[0] == str(archive / "ghost_ops" / "__init__.py")


FINDER = """
import sys
from importlib.util import spec_from_file_location
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        init = {folder!r} + "/__init__.py"
        if name == "ghost_ops":
            return spec_from_file_location(name, init, submodule_search_locations=[{folder!r}])
sys.meta_path.append(Finder)
"""


@pytest.mark.parametrize("own", [True, False])
def test_an_editable_installation(own: bool, here: Path, tmp_path: Path) -> None:
    """Of this checkout: it runs itself. Of another one, which has a library: that one runs."""
    other = checkout(tmp_path / "other")
    (other / "ghost_ops" / LIBRARY).touch()
    target = here if own else other
    finder = FINDER.replace("{folder!r}", repr(str(target / "ghost_ops")))
    assert python("-c", finder + WHERE, cwd=here) == file_of(target)
    pth = f"import sys; sys.path.append({str(target)!r}); "
    assert python("-c", pth + WHERE, cwd=here) == file_of(target)


def test_files_that_differ_are_announced(here: Path, tmp_path: Path) -> None:
    site = package(tmp_path / "site", who="installed")
    said = python("-c", WHO, cwd=here, path=site)
    assert said[0] == "installed"
    text = " ".join(said[1:])
    assert f"UserWarning: the installed ghost_ops in {site}/ghost_ops runs, not the ch" in text
    assert f"checkout in {here}, whose files differ" in text
    assert "`pip install .`" in text


def test_an_error_of_the_installed_package_is_its_own(here: Path, site: Path) -> None:
    (site / "ghost_ops" / "planner.py").write_text("import no_such_module\n")
    code = (
        "import sys\ntry:\n    import ghost_ops\nexcept ImportError as error:\n"
        "    print(error, 'ghost_ops' in sys.modules)"
    )
    assert python("-c", code, cwd=here, path=site) == ["No module named 'no_such_module' False"]


NOTE = "import ghost_ops.checkout as c; print(c.note())"


def test_note_names_the_second_copy(here: Path, site: Path, tmp_path: Path) -> None:
    other = package(tmp_path / "other")
    path = os.pathsep.join(map(str, (site, other)))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert python("-c", NOTE, cwd=here, path=site) == [
        f"the installed package {site}/ghost_ops runs; the checkout {here}, in which nothing was "
        "built, does not"
    ]
    assert python("-c", NOTE, cwd=elsewhere, path=site) == ["None"]
    assert python("-c", NOTE, cwd=elsewhere, path=path) == [
        f"{site}/ghost_ops (1.2) runs; there is also {other}/ghost_ops (1.2), later on sys.path"
    ]


def test_this_process_runs_the_package_that_it_tests() -> None:
    assert not hand_over_module.hand_over("ghost_ops")
    assert sys.modules["ghost_ops"] is ghost_ops
