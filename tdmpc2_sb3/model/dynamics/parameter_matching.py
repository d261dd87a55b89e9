"""Sizes at which structured state-space (SSM) dynamics have as many parameters as the MLP's.

A comparison is fair only between equal parameter counts, so the sizes are found at construction,
for any task and any model size, instead of being listed by hand.

Symbols: Z latent, A action, M mlp_dim, D width, P complex modes, C conditioning width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

HIDDEN_FACTOR = 2  # hidden width of a layer relative to the residual stream's
SELECTIVE_RANK = 8  # rank of the input's influence on the step size

# Parameters that act on z_0 alone are evaluated once per plan and not once per sample and step:
# what is spent there lifts the initial state, from which all else follows, and costs no time.
WIDTH_SHARE = 0.28125  # of mlp_dim: at the 5M model 0.39 of the parameters act on every step
MAX_STEP_SHARE = 0.7  # of the parameters, where small latents or deep stacks would leave too few

TOLERANCE = 0.02  # of the MLP's parameters


@dataclass(frozen=True)
class SSMSizes:
    """Sizes of an SSM stack.

    :param width: D, of the residual stream
    :param modes: P, complex modes of a layer, kept as 2P real numbers
    :param conditioning: C, width of the features of z_0
    """

    width: int
    modes: int
    conditioning: int


def mlp_parameters(latent_dim: int, action_dim: int, mlp_dim: int) -> int:
    """Parameters of the MLP dynamics: (Z+A) -> M -> M -> Z, each layer with a LayerNorm."""
    pairs = ((latent_dim + action_dim, mlp_dim), (mlp_dim, mlp_dim), (mlp_dim, latent_dim))
    return sum(fan_in * out + 3 * out for fan_in, out in pairs)  # with bias and LayerNorm


def step_parameters(
    latent_dim: int, action_dim: int, width: int, modes: int, depth: int, selective: bool
) -> int:
    """Parameters of the SSM that act on every step of every sample."""
    hidden = HIDDEN_FACTOR * width
    layer = 2 * modes * (width + hidden)  # B, C
    layer += 2 * width * hidden  # V, W
    layer += 3 * modes  # nu, omega, beta
    if selective:
        layer += SELECTIVE_RANK * (width + modes)  # W_1, W_2
    norms = 2 * width * depth  # one LayerNorm in front of each layer
    head = width * latent_dim + 3 * latent_dim  # W_o, its bias and its LayerNorm
    return action_dim * width + depth * layer + norms + head


def conditioning_parameters(latent_dim: int, width: int, modes: int, depth: int) -> tuple[int, int]:
    """Parameters that act on z_0 alone, as (fixed, per unit of conditioning width)."""
    return width, latent_dim + 3 + width + 2 * modes * depth  # bias of W_u; W_c, LN, W_u, P_l


def ssm_parameters(
    latent_dim: int, action_dim: int, sizes: SSMSizes, depth: int, selective: bool
) -> int:
    """Parameters of the SSM dynamics of these sizes."""
    width, modes = sizes.width, sizes.modes
    fixed, per_unit = conditioning_parameters(latent_dim, width, modes, depth)
    per_step = step_parameters(latent_dim, action_dim, width, modes, depth, selective)
    return per_step + fixed + per_unit * sizes.conditioning


def match_sizes(
    latent_dim: int,
    action_dim: int,
    mlp_dim: int,
    depth: int = 2,
    selective: bool = True,
    modes: int | None = None,
) -> SSMSizes:
    """The sizes at which the SSM has the MLP's number of parameters, within two per cent.

    The width is 9/32 of mlp_dim, or less where too few parameters would be left for the
    conditioning, whose width then fills the rest.

    :param modes: P, fixed by the user; a quarter of the width if None
    :raises ValueError: if no sizes match, as with many modes in a small model
    """
    target = mlp_parameters(latent_dim, action_dim, mlp_dim)
    best: tuple[float, SSMSizes] | None = None
    for width, num_modes in _candidates(mlp_dim, modes):
        per_step = step_parameters(latent_dim, action_dim, width, num_modes, depth, selective)
        fixed, per_unit = conditioning_parameters(latent_dim, width, num_modes, depth)
        conditioning = max(1, round((target - per_step - fixed) / per_unit))
        sizes = SSMSizes(width, num_modes, conditioning)
        count = ssm_parameters(latent_dim, action_dim, sizes, depth, selective)
        error = abs(count - target) / target
        if error <= TOLERANCE / 2 and per_step <= MAX_STEP_SHARE * target:
            return sizes
        if best is None or error < best[0]:
            best = error, sizes
    if best is None or best[0] > TOLERANCE:
        raise ValueError(
            f"No SSM with depth={depth} and modes={modes} has the {target:,} parameters of the "
            f"MLP dynamics with latent_dim={latent_dim}, action_dim={action_dim} and "
            f"mlp_dim={mlp_dim}: reduce depth or modes, or give sizes by width= and conditioning=."
        )
    return best[1]


def _candidates(mlp_dim: int, modes: int | None) -> Iterator[tuple[int, int]]:
    """Widths with their modes, widest first: multiples of 8 (whole vector registers), then any.

    Last come other numbers of modes in narrow stacks: in the tiniest models a single unit of the
    conditioning is more than two per cent of the parameters.
    """
    widest = max(1, round(WIDTH_SHARE * mlp_dim))
    widths = [*range(widest - widest % 8, 63, -8), *range(min(widest, 63), 0, -1)]
    for width in widths:
        yield width, -(-width // 4) if modes is None else modes
    if modes is None:
        yield from ((width, other) for width in widths if width <= 16 for other in range(1, 9))
