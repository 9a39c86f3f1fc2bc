"""ghost_ops: Ghost modules (GhostNet, CVPR 2020) as fused operators for PyTorch.

- ``FusedGhostModule`` is a drop-in for the reference ``GhostModule``: same arguments, parameters,
  state_dict and numbers, in fewer passes over memory.
- ``functional.ghost_module`` computes a Ghost module on tensors.
- ``fuse`` fuses the Ghost modules of an existing model.
- ``models`` has GhostNet and other networks of fused modules.
- ``graphed`` replays a model's inference as CUDA graphs.
- ``planner`` explains the kernels' plans and the bytes that they move.

``python -m ghost_ops`` prints which backend runs on which device, and why.

Imports go one way: activations, backends, ops < autograd < functional < fusion < nn < convert <
models < planner < __main__.
"""

from .checkout import hand_over

if not hand_over(__name__):  # otherwise another copy stands in sys.modules by now
    from . import torch_version

    torch_version.check()

    from . import activations, backends, functional, models, ops, planner, reference
    from ._version import __version__
    from .backends import use_backend
    from .convert import fuse, reset_cache, unfuse
    from .functional import ghost_module
    from .fusion.graphed import graphed
    from .nn import FusedGhostBottleneck, FusedGhostModule
    from .reference import SqueezeExcite
    from .sync import SyncBatchNorm, convert_sync_batchnorm

    backends.native.load()

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
    "models",
    "ops",
    "planner",
    "reference",
    "reset_cache",
    "unfuse",
    "use_backend",
]
