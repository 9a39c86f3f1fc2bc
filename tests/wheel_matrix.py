"""Try a wheel with several versions of torch: ``python wheel_matrix.py 2.10.0 2.13.0``.

For each version: an environment of its own with torch, the wheel and pytest; then wheel_check.py,
``python -m ghost_ops``, a part of the tests and the compilation of the Triton kernels, all from a
folder without the checkout. Prints a table in Markdown; exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_forward.py", "tests/test_training.py")
COLUMNS = ("torch", "CUDA of torch", "Python", "Triton", "kernels", "GhostNet, training, report")
COLUMNS += ("tests", "Triton kernels", "_cuda.so")


def arguments() -> argparse.Namespace:
    """The command line."""
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torch", nargs="+", help="versions of torch")
    parser.add_argument("--wheel", type=Path, default=wheels[-1] if wheels else None)
    parser.add_argument("--environments", type=Path, help="folder of environments to keep")
    parser.add_argument("--keyword", default="native and silu", help="pytest's -k for the tests")
    chosen = parser.parse_args()
    if chosen.wheel is None:
        parser.error("there is no wheel in dist/; `make wheel` builds one, --wheel names another")
    return chosen


def python_of(folder: Path, version: str, wheel: Path) -> Path:
    """An environment with this torch and the wheel; an existing environment is used again."""
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([*pip, f"torch=={version}"], check=True)
    subprocess.run([*pip, "numpy", "pytest", "hypothesis"], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", str(wheel)], check=True)
    return python


def run(python: Path, *command: str, cwd: Path) -> tuple[bool, str]:
    """Whether the command succeeded, and the last line of its output; all of it on a failure."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GHOST_OPS_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(python), *command], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(f"failed: {' '.join(command)}\n{done.stdout}\n{done.stderr}", file=sys.stderr)
    return done.returncode == 0, (done.stdout.strip().splitlines() or [""])[-1]


# Target, dtype, layout and depthwise size: what tests/triton_compile.py compiles.
TRITON_CASES = ("sm_90 float16 nhwc 3", "sm_80 float16 nhwc 5", "sm_90 float32 nchw 3")
triton_results: dict[str, str] = {}  # by version: minutes for each


def compile_triton(python: Path, version: str | None, cwd: Path) -> str:
    """Whether the Triton kernels compile; how many bytes of registers spill is for the tests."""
    if version is None:
        return "no Triton"
    if version not in triton_results:
        spills = []
        for case in TRITON_CASES:
            compiles, last = run(python, "tests/triton_compile.py", *case.split(), cwd=cwd)
            if not compiles:
                triton_results[version] = f"FAILED: {case}"
                break
            spills.append(max(kernel["spilled"] for kernel in json.loads(last)))
        else:
            text = ", ".join(map(str, spills))
            triton_results[version] = f"{len(spills)} targets; spill at most {text} bytes"
    return triton_results[version]


def row(python: Path, chosen: argparse.Namespace, cwd: Path) -> list[str]:
    """One line of the table; a cell that starts with FAILED is a failure."""
    works, last = run(python, "tests/wheel_check.py", cwd=cwd)
    facts = json.loads(last) if works else {}
    reports, _ = run(python, "-m", "ghost_ops", cwd=cwd)
    # fmt: off
    passes, tests = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
                        "-k", chosen.keyword, *TESTS, cwd=cwd)
    # fmt: on
    library = facts.get("cuda_library", "")
    loads = not facts.get("cuda") or library.startswith(("loaded", "not in"))
    return [
        str(facts.get("torch", python.parent.parent.name)),
        str(facts.get("cuda") or "none"),
        str(facts.get("python", "")),
        str(facts.get("triton") or "none"),
        facts.get("cpu_library", "FAILED").removeprefix("loaded ghost_ops._C, instruction set "),
        "right" if works and reports else "FAILED",
        ("" if passes else "FAILED: ") + tests.strip("= ").split(" in ")[0],
        compile_triton(python, facts.get("triton"), cwd),
        ("" if loads else "FAILED: ") + library.split(" into ")[0].split("; ")[0],
    ]


def main() -> int:
    """Print the table."""
    chosen = arguments()
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        shutil.copytree(ROOT / "tests", cwd / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", cwd)  # pytest's settings
        folder = chosen.environments or cwd
        for version in chosen.torch:
            environment = folder / f"torch-{version}"
            try:
                python = python_of(environment, version, chosen.wheel.resolve())
                rows.append(row(python, chosen, cwd))
            except subprocess.CalledProcessError as error:
                rows.append([version, f"FAILED: {error}"])
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
            if chosen.environments is None:
                shutil.rmtree(environment, ignore_errors=True)
    print(f"\n{chosen.wheel.name}, {chosen.wheel.stat().st_size / 1e6:.1f} MB\n")
    print("\n".join("| " + " | ".join(cells) + " |" for cells in rows))
    return int(any(cell.startswith("FAILED") for cells in rows for cell in cells))


if __name__ == "__main__":
    raise SystemExit(main())
