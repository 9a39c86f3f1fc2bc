"""ghost_ops: Ghost modules (GhostNet, CVPR 2020) as fused operators for PyTorch.

``FusedGhostModule`` takes the place of the reference ``GhostModule``: same arguments, parameters,
state_dict and numbers, in fewer passes over memory. ``functional.ghost_module`` does the same on
tensors. ``python -m ghost_ops`` tells which implementation runs where, and why.
"""

from . import activations, backends, functional, ops, planner, reference
from ._version import __version__
from .backends import use_backend
from .functional import ghost_module
from .nn import FusedGhostModule

__all__ = [
    "FusedGhostModule",
    "__version__",
    "activations",
    "backends",
    "functional",
    "ghost_module",
    "ops",
    "planner",
    "reference",
    "use_backend",
]

backends.native.load()
