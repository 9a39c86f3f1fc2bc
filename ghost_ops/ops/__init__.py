"""The operators: schema, fake and eager implementation, one definition each; see ``define``."""

# ruff: noqa: F401  (the names are re-exported)

from .conv import (
    MOST_POOLED,
    conv_stem,
    fold,
    ghost_apply_gated,
    ghost_apply_pooled,
    ghost_conv_apply,
    has_conv,
    has_conv_kernel,
    has_stem,
    native_ghost_conv_apply,
    native_run_program,
)
from .define import decompositions
from .depthwise import (
    depthwise_conv,
    depthwise_conv_sums,
    depthwise_norm,
    depthwise_norm_backward,
    has_depthwise,
)
from .gate import (
    HARD_SIGMOID,
    SIGMOID,
    pack_gate,
    plane_affine,
    plane_dot,
    squeeze_excite_,
    squeeze_excite_gate,
)
from .ghost import NAMES, allow_tf32, native, packed_numel, packs_pairs, triton
from .select import on_gpu
