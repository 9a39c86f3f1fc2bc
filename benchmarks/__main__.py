"""``python -m benchmarks``: run everything; ``python -m benchmarks NAME ...``: run one script."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

SCRIPTS = {
    "module": "one Ghost module: time in floors, ratios to PyTorch, saved memory, call overhead",
    "plots": "pictures from a results file of `module`",
    "demo": "train on real digits with the reference and the fused modules, then compare shapes",
}
RESULTS = "results/module.json"


def _run(script: str, arguments: Sequence[str]) -> int:
    # A process of its own: `module` replaces its process to set up the allocator.
    return subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *arguments]).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script that is named, or the full report: ``module`` with its options, then plots."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help", "list"):
        print("usage: python -m benchmarks [options of module | NAME options]\n")
        for name, purpose in SCRIPTS.items():
            print(f"  {name:8} {purpose}")
        return 0
    if argv and not argv[0].startswith("-"):
        if argv[0] not in SCRIPTS:
            print(f"error: no script {argv[0]!r}; known: {', '.join(SCRIPTS)}", file=sys.stderr)
            return 2
        return _run(argv[0], argv[1:])
    if "--out" in argv:
        print("error: --out belongs to one script: python -m benchmarks module", file=sys.stderr)
        return 2
    status = _run("module", [*argv, "--out", RESULTS])
    return status or _run("plots", [RESULTS])


if __name__ == "__main__":
    raise SystemExit(main())
