"""Networks of fused Ghost modules: GhostNet, and the CIFAR-size networks of the paper's ablations.

====================  ===============================  ================================
network               parameters                       multiply-adds of convolutions
====================  ===============================  ================================
``ghostnet(1.0)``     5.18 M                           141 M at 224 x 224
``ghost_vgg16()``     7.7 M                            158 M at 32 x 32
``ghost_resnet()``    0.43 M                           63 M at 32 x 32
====================  ===============================  ================================

``count_macs`` computes the last column. A function of this module builds what ``fuse`` makes of the
plain network that the function of the same name in ``reference`` builds; ``unfuse`` gives the plain
network back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, reference
from .convert import fuse, unfuse
from .fusion.fused import fused_forward, named
from .fusion.network import FusedNetwork
from .nn import FusedGhostBottleneck, FusedGhostModule

__all__ = [
    "FusedGhostNet",
    "LoadReport",
    "count_macs",
    "ghost_resnet",
    "ghost_vgg16",
    "ghostnet",
    "load_checkpoint",
]


@named
class FusedGhostNet(FusedNetwork, reference.GhostNet):
    """``reference.GhostNet`` with fused bottlenecks, stem and head; made by ``ghostnet``.

    [N, in_chans, H, W] -> logits [N, num_classes]. Children and state_dict keys are those of
    ``reference.GhostNet``.

    Args:
        width, num_classes, dropout, in_chans: as in ``ghostnet``.

    Raises:
        TypeError, ValueError: as ``ghostnet``.

    Source: GhostNet, CVPR 2020, table 1.
    """

    _ghost_ops_base = reference.GhostNet
    forward = fused_forward(reference.GhostNet.forward)

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        dropout: float = 0.2,
        in_chans: int = 3,
    ) -> None:
        reference.GhostNet.__init__(
            self, width, num_classes, dropout, in_chans, bottleneck=FusedGhostBottleneck
        )


def ghostnet(
    width: float = 1.0, num_classes: int = 1000, dropout: float = 0.2, in_chans: int = 3
) -> FusedGhostNet:
    """GhostNet of fused modules, with PyTorch's initial weights.

    Args:
        width: factor on every number of channels (then rounded to a multiple of 4); the paper has
            0.5, 1.0 and 1.3.
        num_classes: size of the output.
        dropout: share of the values that are dropped before the classifier in training, in [0, 1).
        in_chans: channels of the input.

    Returns:
        The network in training mode: [N, in_chans, H, W] -> logits [N, num_classes].

    Raises:
        TypeError: width or dropout is not a number, or num_classes or in_chans not an int.
        ValueError: an argument is out of range.

    Source: GhostNet, CVPR 2020, table 1 and section 3.3.
    """
    return FusedGhostNet(width, num_classes, dropout, in_chans)


def ghost_resnet(
    depth: int = 56,
    ratio: int = 2,
    dw_size: int = 3,
    num_classes: int = 10,
    in_chans: int = 3,
) -> reference.GhostResNet:
    """ResNet for CIFAR-size inputs with fused Ghost modules for its 3x3 convolutions.

    [N, in_chans, H, W] -> logits [N, num_classes]. The stem is a plain convolution. The shortcuts
    have no parameters (subsampling and zero padding).

    Args:
        depth: 6 n + 2; 56 in the paper.
        ratio, dw_size: of the Ghost modules; the paper has 2 and 3.
        num_classes, in_chans: size of the output, channels of the input.

    Returns:
        The network in training mode, with PyTorch's initial weights. Its Ghost modules are fused,
        and on a CPU its blocks too; the forward of the whole is that of ``reference.GhostResNet``.

    Raises:
        TypeError: an argument is not an int.
        ValueError: depth is not 6 n + 2, or a number is less than 1.

    Source: GhostNet, CVPR 2020, section 4.1; He et al., CVPR 2016, section 4.2.
    """
    numbers = depth, ratio, dw_size, num_classes, in_chans
    model = reference.GhostResNet(*numbers, ghost=FusedGhostModule)
    fuse(model)
    return model


def ghost_vgg16(
    ratio: int = 2, dw_size: int = 3, num_classes: int = 10, in_chans: int = 3
) -> nn.Sequential:
    """VGG-16 for CIFAR-size inputs with fused Ghost modules for its 3x3 convolutions.

    [N, in_chans, 32 k, 32 k] -> logits [N, num_classes]. Thirteen Ghost modules with 3x3 primary
    convolutions, five max-poolings, average pooling and two linear layers.

    Args:
        ratio: s of the Ghost modules; 2 in the best network of the paper.
        dw_size: d of the Ghost modules; 3 in the best network of the paper.
        num_classes, in_chans: size of the output, channels of the input.

    Returns:
        The network in training mode, with PyTorch's initial weights.

    Raises:
        TypeError: an argument is not an int.
        ValueError: a number is less than 1, or dw_size is even.

    Source: GhostNet, CVPR 2020, section 4.1, tables 3 to 5.
    """
    model = reference.ghost_vgg16(ratio, dw_size, num_classes, in_chans, ghost=FusedGhostModule)
    fuse(model)
    return model


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of all convolutions and linear layers for one input of ``shape``.

    Biases, norms, activations and pooling do not count, as in the paper. A copy of the model runs
    once on the meta device; the model itself does not change.

    Args:
        model: any module that takes one tensor.
        shape: of its input, such as (1, 3, 224, 224).

    Returns:
        The number of multiply-adds, over all images of the input.

    Raises:
        TypeError: model is not a module, or shape is no tuple of ints.
        Any error of the model on the meta device.
    """
    arguments.module("model", model)
    twin = copy.deepcopy(model).to("meta").float().eval()
    unfuse(twin)
    total = 0

    def count(module: Any, _: Any, out: Tensor) -> None:
        nonlocal total
        weight = module.weight
        total += out.numel() // weight.size(0) * weight.numel()

    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel():
            module.register_forward_hook(count)
    with torch.no_grad():
        twin(torch.empty(shape, device="meta"))
    return total


# --- checkpoints ------------------------------------------------------------------------------


@dataclass
class LoadReport:
    """The comparison of a checkpoint's keys with a model's; ``repr`` lists the differences.

    Attributes:
        loaded: keys that were copied into the model.
        missing: keys of the model that are not in the checkpoint.
        unexpected: keys of the checkpoint that are not in the model.
        mismatched: keys of both with different shapes: (in the checkpoint, in the model).
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether both have the same keys with the same shapes."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __repr__(self) -> str:
        lines = [f"{len(self.loaded)} of {len(self.loaded) + len(self.missing)} entries loaded"]
        if self.mismatched:
            lines[0] = f"{len(self.loaded)} entries loaded"
            lines.append(f"{len(self.mismatched)} of another shape:")
            lines += [
                f"  {key}: {list(got)} in the checkpoint, {list(want)} in the model"
                for key, (got, want) in list(self.mismatched.items())[:_SHOWN]
            ]
        for name, keys in (("missing", self.missing), ("unexpected", self.unexpected)):
            if keys:
                lines.append(f"{len(keys)} {name}:")
                lines += [f"  {key}" for key in keys[:_SHOWN]]
                if len(keys) > _SHOWN:
                    lines.append(f"  ... and {len(keys) - _SHOWN} more")
        return "\n".join(lines)


_SHOWN = 8
_CONTAINERS = ("state_dict", "model", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "model.", "_orig_mod.")


def load_checkpoint(
    model: nn.Module, checkpoint: Mapping[str, Any], *, strict: bool = True
) -> LoadReport:
    """Load a published GhostNet checkpoint, and report which entries fit.

    The keys are those of the authors and timm. The entries may be under ``state_dict``, ``model``,
    ``state_dict_ema`` or ``model_ema``, and may have the prefixes that DataParallel, DDP and
    torch.compile add. A missing ``num_batches_tracked`` is no error (old checkpoints have none).

    Args:
        model: the network, such as ``ghostnet()``.
        checkpoint: the result of ``torch.load(..., weights_only=True)``.
        strict: True: if an entry does not fit, raise and load nothing. False: load the entries that
            fit; the report lists the others.

    Returns:
        The report of loaded, missing, unexpected and mismatched keys.

    Raises:
        TypeError: model is not a module, or checkpoint not a mapping of names to tensors.
        RuntimeError: strict, and an entry does not fit; the message lists all such entries. The
            model is unchanged.
    """
    arguments.module("model", model)
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"checkpoint must be a mapping, got {type(checkpoint).__name__}")
    state: Mapping[str, Any] = checkpoint
    for name in _CONTAINERS:
        if isinstance(state.get(name), Mapping):
            state = state[name]
            break
    tensors = {str(key): t for key, t in state.items() if isinstance(t, Tensor)}
    if not tensors:
        raise TypeError(
            "checkpoint holds no tensors, neither directly nor under "
            f"{', '.join(map(repr, _CONTAINERS))}; its keys are {list(state)[:_SHOWN]}"
        )
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key[len(prefix) :]: t for key, t in tensors.items()}
    own = model.state_dict()
    report = LoadReport()
    fitting = {}
    for key, t in tensors.items():
        if key not in own:
            report.unexpected.append(key)
        elif own[key].shape != t.shape:
            report.mismatched[key] = tuple(t.shape), tuple(own[key].shape)
        else:
            fitting[key] = t
    report.loaded = list(fitting)
    report.missing = [
        key for key in own if key not in tensors and not key.endswith("num_batches_tracked")
    ]
    if strict and not report.complete:
        raise RuntimeError(
            f"the checkpoint does not fit {type(model).__name__}, which is left as it was:\n"
            f"{report!r}"
        )
    model.load_state_dict(fitting, strict=False)
    return report
