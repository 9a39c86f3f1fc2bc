"""ghost_ops: Ghost modules (GhostNet, CVPR 2020) as fused operators for PyTorch.

``FusedGhostModule`` takes the place of the reference ``GhostModule``: same arguments, parameters,
state_dict and numbers, in fewer passes over memory. ``functional.ghost_module`` does the same on
tensors. ``fuse`` does it to a whole model that exists already; ``models`` has GhostNet and other
networks made of such modules. ``graphed`` replays a model's inference as CUDA graphs. ``python -m
ghost_ops`` tells which implementation runs where, and why.
"""

from . import activations, backends, functional, models, planner, reference
from ._version import __version__
from .backends import use_backend
from .convert import fuse, reset_cache, unfuse
from .functional import ghost_module
from .fusion.graphed import graphed
from .nn import FusedGhostBottleneck, FusedGhostModule
from .ops import ghost as ops
from .ops import layers as model_ops
from .reference import SqueezeExcite
from .sync import SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "FusedGhostBottleneck",
    "FusedGhostModule",
    "SqueezeExcite",
    "SyncBatchNorm",
    "__version__",
    "activations",
    "backends",
    "convert_sync_batchnorm",
    "functional",
    "fuse",
    "ghost_module",
    "graphed",
    "model_ops",
    "models",
    "ops",
    "planner",
    "reference",
    "reset_cache",
    "unfuse",
    "use_backend",
]

backends.native.load()
