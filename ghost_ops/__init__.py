"""ghost_ops: Ghost modules (GhostNet, CVPR 2020) as fused operators for PyTorch.

- ``FusedGhostModule`` is a drop-in for the reference ``GhostModule``: same arguments, parameters,
  state_dict and numbers, in fewer passes over memory.
- ``functional.ghost_module`` computes a Ghost module on tensors.
- ``fuse`` fuses the Ghost modules of an existing model; ``report`` shows what is fused.
- ``models`` has GhostNet and other networks of fused modules; ``reference`` has the plain ones.
- ``graphed`` replays a model's inference as CUDA graphs.
- ``planner`` explains the kernels' plans and the bytes that they move.

``python -m ghost_ops`` prints which backend runs on which device, and why.

Imports go one way: activations, backends, ops < formula < reference < autograd < functional <
fusion < nn < convert < models < planner < diagnosis < __main__.
"""

from .checkout import hand_over
from .environment import runs_report

# If another copy is handed over to, it stands in sys.modules by now. `python -m ghost_ops` imports
# the rest itself, and reports what keeps it from importing.
if not hand_over(__name__) and not runs_report():
    from . import torch_version

    torch_version.check()

    from . import activations, backends, functional, models, planner, reference
    from ._version import __version__ as __version__
    from .backends import use_backend
    from .convert import fuse, report, reset_cache, unfuse
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
    "activations",
    "backends",
    "convert_sync_batchnorm",
    "functional",
    "fuse",
    "ghost_module",
    "graphed",
    "models",
    "planner",
    "reference",
    "report",
    "reset_cache",
    "unfuse",
    "use_backend",
]


def __dir__() -> list[str]:
    """The public names, without the modules that Python binds to a package on their import."""
    return sorted([*__all__, "__version__"])
