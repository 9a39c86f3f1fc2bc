"""What the build of this package found, and why a library is missing."""

from __future__ import annotations

import json
from pathlib import Path

PATH = Path(__file__).resolve().parent / "build_record.json"


def read() -> dict[str, str]:
    """What setup.py wrote into ``build_record.json``, beside the libraries.

    Returns:
        ``cpu`` and ``cuda``: "built", or why that library was left out. With a library built:
        ``torch``, ``compiler`` and, for CUDA, ``nvcc``, ``architectures``. {} without a record.
    """
    try:
        found = json.loads(PATH.read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def why_missing(library: str) -> str:
    """Why a library is not there, and how to get it, as the end of a sentence.

    Args:
        library: ``"cpu"`` or ``"cuda"``.
    """
    checkout = PATH.parent.parent
    howto = "`pip install .` in the checkout of ghost_ops builds it"
    if (checkout / "setup.py").is_file():
        howto = f"`pip install -e .` in {checkout} builds it"
    if (why := read().get(library, "built")) != "built":
        return f"{why}; once that has changed, {howto}"
    needs = {"cpu": "a C++17 compiler", "cuda": "a C++17 compiler and nvcc"}[library]
    return f"with {needs}, {howto}"
