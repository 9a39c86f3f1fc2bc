"""timm and Ultralytics, imported also where torchvision's compiled library does not load."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from types import ModuleType

import torch

_fragments: list[torch.library.Library] = []


def timm() -> ModuleType:
    """The package timm.

    It imports torchvision, whose wheel for CUDA does not load into a torch without CUDA. timm's
    models use none of its operators, but torchvision's Python part registers descriptions of its
    operators, so that they are declared here where they are missing.

    Raises:
        ImportError: timm or torchvision is not installed.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ImportError(str(error)) from error
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _fragments.append(library)  # the declarations live as long as this object
    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    return importlib.import_module("timm")


def ultralytics(module: str) -> ModuleType:
    """A module of Ultralytics, such as ``nn.modules.conv``.

    Raises:
        ImportError: Ultralytics, or something that it needs, is not installed.
    """
    # Ultralytics writes a settings file; the user's file stays unchanged.
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    try:
        return importlib.import_module(f"ultralytics.{module}")
    except ImportError:
        raise
    except Exception as error:  # whatever its import raises, the package cannot be used
        raise ImportError(f"ultralytics does not import here: {error}") from error
