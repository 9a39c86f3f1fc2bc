"""The operators of the Ghost module by backend: ``native``, ``triton`` and the module ``eager``.

``torch.ops.ghost_ops_triton.*`` have the schemas of ``torch.ops.ghost_ops.*`` and the kernels of
the Triton backend. With two namespaces, both backends can run on one device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.native import OPS as NAMES
from ..backends.triton import layout
from . import define, eager
from .define import native as native
from .eager import packed_numel as packed_numel
from .eager import packs_pairs as packs_pairs


def _fake_triton_pack(a: Any) -> Tensor:
    channels, m, g, d = eager.pack_sizes(a)
    numel = layout.packed_numel(channels, m, g, d, a.w2.dtype, a.w1 is not None)
    return a.w2.new_empty(numel + eager.slope_count(a), dtype=torch.float32)


def _triton(name: str) -> Callable[..., Any]:
    """An operator of the Triton backend, which is imported at the first call."""
    module = "backward" if name == "ghost_backward" else "forward"

    def call(*arguments: Any) -> Any:
        functions = importlib.import_module(f"ghost_ops.backends.triton.{module}")
        return getattr(functions, name)(*arguments)

    return call


# A module variable, because the operators are removed when their library is garbage-collected.
_triton_library = torch.library.Library("ghost_ops_triton", "DEF")
for _name in NAMES:
    _fake = _fake_triton_pack if _name == "ghost_pack" else define.FAKES[_name]
    define.implement(_triton_library, define.SCHEMAS[_name], _triton(_name), _fake)

# The operators of the Triton backend, by name, as ``native`` has those of the native backend.
triton: Any = type(
    "triton", (), {name: define.overload("ghost_ops_triton", name) for name in NAMES}
)


def allow_tf32() -> bool:
    """Whether float32 convolutions may run in TF32, by the most specific switch of torch set."""
    backends = torch.backends
    for switch in (getattr(backends.cudnn, "conv", None), backends.cudnn, backends):
        precision = getattr(switch, "fp32_precision", "none")
        if precision != "none":
            return precision == "tf32"
    return False


# The CUDA library calls this operator, because the stable ABI has no access to the switches.
define.library.define("_allow_tf32() -> bool")
define.library.impl("_allow_tf32", allow_tf32, "CompositeImplicitAutograd")
