"""Kernels for float32 on a CPU, built at first use; plain torch elsewhere.

On a CPU the elementwise part of the world model (LayerNorm, Mish, SimNorm, cross-entropy over bins
and their gradients) costs as much as its matrix products when it is a chain of stock kernels that
each read and write a whole array. ``kernels.c`` does each chain in one pass, and the products of
x86 processors with it (:mod:`tdmpc2_sb3.kernels.networks`). It is plain C without any library's
headers, compiled by the machine's own compiler in some seconds and kept in the user's cache
directory (:mod:`tdmpc2_sb3.kernels.library`).

Callers ask :func:`usable` and keep a plain torch path, which a compiler, other devices and double
precision take too.
"""

from tdmpc2_sb3.kernels.arguments import Dropped, KeptLayers, Layer, layers_made_once, on_simplices
from tdmpc2_sb3.kernels.arrays import AdamArrays, adam_step, lerp_, total_norm, usable_arrays
from tdmpc2_sb3.kernels.capture import Captured
from tdmpc2_sb3.kernels.conditions import usable
from tdmpc2_sb3.kernels.elementwise import add, clear_, copy_, exponential, join, least, zeros
from tdmpc2_sb3.kernels.library import SWITCH, library, with_calls
from tdmpc2_sb3.kernels.losses import (
    lambda_returns,
    squared_loss,
    termination_loss,
    two_hot_cross_entropy,
    two_hot_inverse,
    two_hot_inverse_backward,
    two_hot_loss,
)
from tdmpc2_sb3.kernels.networks import (
    Evaluation,
    GradientRoom,
    Gradients,
    each_parameter,
    evaluation,
    networks,
)
from tdmpc2_sb3.kernels.norms import Activation, Norm, layer_norm, norm_backward, norm_forward
from tdmpc2_sb3.kernels.planning import (
    Draws,
    Elites,
    PlanningNetworks,
    StateSpace,
    StateSpaceLayer,
    choose_action,
    count_simplices,
    predicted_simplices,
    search,
    usable_plan,
)
from tdmpc2_sb3.kernels.policy import PolicyDraw, policy_objective
from tdmpc2_sb3.kernels.products import fixed_weights, goes_by_torch
from tdmpc2_sb3.kernels.rollouts import Rollout, rollout, usable_rollout
from tdmpc2_sb3.kernels.state_space import (
    Scan,
    gelu_sum,
    gelu_sum_backward,
    selective_scan,
    selective_scan_backward,
)

__all__ = [
    "SWITCH",
    "Activation",
    "AdamArrays",
    "Captured",
    "Draws",
    "Dropped",
    "Elites",
    "Evaluation",
    "GradientRoom",
    "Gradients",
    "KeptLayers",
    "Layer",
    "Norm",
    "PlanningNetworks",
    "PolicyDraw",
    "Rollout",
    "Scan",
    "StateSpace",
    "StateSpaceLayer",
    "adam_step",
    "add",
    "choose_action",
    "clear_",
    "copy_",
    "count_simplices",
    "each_parameter",
    "evaluation",
    "exponential",
    "fixed_weights",
    "gelu_sum",
    "gelu_sum_backward",
    "goes_by_torch",
    "join",
    "lambda_returns",
    "layer_norm",
    "layers_made_once",
    "least",
    "lerp_",
    "library",
    "networks",
    "norm_backward",
    "norm_forward",
    "on_simplices",
    "policy_objective",
    "predicted_simplices",
    "rollout",
    "search",
    "selective_scan",
    "selective_scan_backward",
    "squared_loss",
    "termination_loss",
    "total_norm",
    "two_hot_cross_entropy",
    "two_hot_inverse",
    "two_hot_inverse_backward",
    "two_hot_loss",
    "usable",
    "usable_arrays",
    "usable_plan",
    "usable_rollout",
    "with_calls",
    "zeros",
]
