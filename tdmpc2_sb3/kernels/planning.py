"""Action sequences of a planner: rolled out, rewarded and valued in one call each.

A planner evaluates few rows by many small networks, and what lies between two of them (joining
inputs, squashing, discounting) would take as long as the networks do. ``kernels.c`` takes each
sequence through all of them.

Shapes: E environments, N sequences each, H horizon, A action, Z latent, K elites, Q heads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch as th

from tdmpc2_sb3.kernels.arguments import Layer, arguments_of, multiplied_here
from tdmpc2_sb3.kernels.library import (
    DynamicsArgument,
    LayerArgument,
    SequencesArgument,
    StateSpaceLayerArgument,
    call,
    library,
)
from tdmpc2_sb3.kernels.products import MIN_ROWS, product_threads


class StateSpaceLayer(NamedTuple):
    """A layer of state-space dynamics with D-dimensional stream and P modes."""

    gain: th.Tensor  # of the LayerNorm in front, [D]
    shift: th.Tensor  # [D]
    eps: float
    products: Layer  # B, V and, if selective, W_1 side by side
    selection: Layer | None  # W_2
    readout: Layer  # C
    mix: Layer  # W
    alpha: th.Tensor  # [P]
    omega: th.Tensor  # [P]
    beta: th.Tensor  # [P]


class StateSpace(NamedTuple):
    """State-space dynamics, see :mod:`tdmpc2_sb3.dynamics.ssm`."""

    features: Layer  # W_c
    context: Layer  # W_u
    starts: Layer  # P_1..P_L
    action: Layer  # W_a
    out: Layer  # W_o
    stack: Sequence[StateSpaceLayer]

    def layers(self) -> list[Layer]:
        """All that is multiplied."""
        result = [self.features, self.context, self.starts, self.action, self.out]
        for _, _, _, products, selection, readout, mix, *_ in self.stack:
            result += [products, readout, mix]
            if selection is not None:
                result.append(selection)
        return result


class PlanningNetworks(NamedTuple):
    """What a planner evaluates."""

    dynamics: Sequence[Layer] | StateSpace  # of (z, a)
    reward: Sequence[Layer]  # of (z, a)
    policy: Sequence[Layer]  # of z, to 2 A
    q: Sequence[Layer]  # of (z, a), Q networks
    termination: Sequence[Layer] | None  # of z, if episodes end

    def layers(self) -> list[Layer]:
        """All layers."""
        dynamics = self.dynamics
        steps = dynamics.layers() if isinstance(dynamics, StateSpace) else dynamics
        return [*steps, *self.reward, *self.policy, *self.q, *(self.termination or ())]


def plans(networks: PlanningNetworks) -> bool:
    """Whether ``kernels.c`` multiplies networks of these sizes."""
    return multiplied_here(MIN_ROWS, networks.layers())


class _Network:
    """A network, or chosen ones of Q, as an argument."""

    def __init__(self, layers: Sequence[Layer] | None, members: tuple[int, ...] = (0,)):
        self.count = len(layers or ())
        self.arguments: ctypes.Array[LayerArgument] | None = None
        self.multiply_adds = 0  # a row
        if layers:
            self._alive = found = arguments_of(layers)
            self.arguments = found.forward(members)
            self.multiply_adds = found.multiply_adds * len(members)


class _Dynamics:
    """Dynamics as an argument."""

    def __init__(self, dynamics: Sequence[Layer] | StateSpace):
        self.memory = 0  # numbers kept a row
        layers = dynamics.layers() if isinstance(dynamics, StateSpace) else dynamics
        found = arguments_of(layers)
        self.multiply_adds = found.multiply_adds  # a row and step
        arguments = found.forward((0,))
        self._alive: list[object] = [dynamics, found, arguments]
        if not isinstance(dynamics, StateSpace):
            address = ctypes.addressof(arguments)
            self.argument = (DynamicsArgument * 1)(DynamicsArgument(address, len(arguments)))
            return
        single, rest = arguments[:5], iter(arguments[5:])
        stack = [_state_space_argument(layer, rest) for layer in dynamics.stack]
        pointers = (StateSpaceLayerArgument * len(stack))(*stack)
        self._alive.append(pointers)
        self.argument = (DynamicsArgument * 1)(
            DynamicsArgument(None, 0, *single, ctypes.addressof(pointers), len(stack))
        )
        self.memory = _state_space_memory(dynamics)


def _state_space_argument(
    layer: StateSpaceLayer, arguments: Iterator[LayerArgument]
) -> StateSpaceLayerArgument:
    """
    :param arguments: of its part of :meth:`StateSpace.layers`
    """
    products, readout, mix = (next(arguments) for _ in range(3))
    selection = LayerArgument() if layer.selection is None else next(arguments)
    return StateSpaceLayerArgument(
        layer.gain.data_ptr(),
        layer.shift.data_ptr(),
        products,
        selection,
        readout,
        mix,
        *(each.data_ptr() for each in (layer.alpha, layer.omega, layer.beta)),
        len(layer.alpha),
        layer.eps,
    )


def _state_space_memory(dynamics: StateSpace) -> int:
    """Numbers a row of ``state_space_memory`` in kernels.c."""
    first, depth = dynamics.stack[0], len(dynamics.stack)
    width, modes = len(first.gain), len(first.alpha)
    states = 2 * modes * depth
    hidden = len(first.readout.weight)
    if first.selection is not None:
        hidden = max(hidden, first.selection.weight.shape[1])
    of_start = len(dynamics.features.weight) + width + states
    return max(of_start, 2 * width + len(first.products.weight) + modes + hidden + states)


class Refit(NamedTuple):
    """Elites, and the Gaussian that they make."""

    actions: th.Tensor  # [H, E, K, A]
    weights: th.Tensor  # [E, K]
    mean: th.Tensor  # [H, E, A]
    std: th.Tensor  # [H, E, A]


class Sequences:
    """The action sequences of one plan; weights must be held (``weights_held``) for as long.

    ``actions``, [H, E, N, A], are written by the caller or by :meth:`rollout` under the policy;
    ``latents``, z_1..z_H, [H, E, N, Z], by :meth:`rollout`.

    :param networks: that :func:`plans` agrees to
    :param bins: values of the bins of reward and Q
    :param start: z_0, [E, Z]
    :param horizon: H
    :param num_sequences: N
    :param gamma: discount a step
    """

    def __init__(
        self,
        networks: PlanningNetworks,
        bins: th.Tensor,
        start: th.Tensor,
        horizon: int,
        num_sequences: int,
        gamma: float,
    ):
        num_envs, latent_dim = start.shape
        self.action_dim = networks.policy[-1].weight.shape[-2] // 2
        self.sizes = (horizon, num_envs, num_sequences)
        self.actions = start.new_empty(*self.sizes, self.action_dim)
        self.latents = start.new_empty(*self.sizes, latent_dim)
        self._start = start.contiguous()
        self._bins = bins
        self._gamma = gamma
        self._q = networks.q
        self._reward = _Network(networks.reward)
        self._policy = _Network(networks.policy)
        self._dynamics = _Dynamics(networks.dynamics)
        self._termination = _Network(networks.termination)
        self._rewards, self._discounts = start.new_empty(2, num_envs, num_sequences)
        self._widest = max(each.weight.shape[-2] for each in networks.layers())
        size = _scratch_size(self._widest, self._dynamics.memory)
        self._scratch = start.new_empty(th.get_num_threads() * size)

    def rollout(self, first: int, last: int, policy_noise: th.Tensor | None = None) -> None:
        """Latents of the sequences from ``first`` to before ``last``.

        :param policy_noise: if given, their actions are drawn from the policy on the way,
            standard normal, [H, E, last - first, A]
        """
        policy = self._policy if policy_noise is not None else _Network(None)
        steps = self.sizes[0] * (last - first)
        call(
            "plan_rollout",
            self._argument(first, last),
            self._dynamics.argument,
            policy.arguments,
            policy.count,
            self._start,
            None if policy_noise is None else policy_noise.contiguous(),
            self.actions,
            self.latents,
            self._scratch,
            self._threads(steps, self._dynamics, policy),
        )

    def sum_rewards(self, first: int, last: int) -> None:
        """Rewards on the way, of the same sequences; :meth:`values` reads them."""
        steps = self.sizes[0] * (last - first)
        call(
            "plan_rewards",
            self._argument(first, last),
            self._reward.arguments,
            self._reward.count,
            self._termination.arguments,
            self._termination.count,
            self._bins,
            self._start,
            self.actions,
            self.latents,
            self._rewards,
            self._discounts,
            self._gamma,
            self._scratch,
            self._threads(steps, self._reward, self._termination),
        )

    def values(self, noise: th.Tensor, heads: tuple[int, int]) -> th.Tensor:
        """What all sequences are worth, [E, N].

        :param noise: standard normal, of the policy's actions at z_H, [E, N, A]
        :param heads: of Q, whose mean counts
        """
        q = _Network(self._q, heads)
        num_sequences = self.sizes[2]
        values = th.empty_like(self._rewards)
        call(
            "plan_values",
            self._argument(0, num_sequences),
            self._policy.arguments,
            self._policy.count,
            q.arguments,
            q.count,
            self._bins,
            self.latents[-1],
            noise.contiguous(),
            self._rewards,
            self._discounts,
            values,
            th.empty_like(self.actions[-1]),
            self._scratch,
            self._threads(num_sequences, self._policy, q),
        )
        return values

    def refit(
        self,
        elite_values: th.Tensor,
        positions: th.Tensor,
        temperature: float,
        min_std: float,
        max_std: float,
    ) -> Refit:
        """The Gaussian that the elites make, weighted by their values.

        :param elite_values: the highest first, [E, K]
        :param positions: of the elites among the sequences, [E, K]
        :param temperature: factor of the values in the weights' exponents
        :param min_std: least standard deviation
        :param max_std: greatest
        """
        horizon, num_envs, num_sequences = self.sizes
        num_elites = elite_values.shape[1]
        result = Refit(
            self.actions.new_empty(horizon, num_envs, num_elites, self.action_dim),
            th.empty_like(elite_values),
            *self.actions.new_empty(2, horizon, num_envs, self.action_dim),
        )
        call(
            "plan_refit",
            self._argument(0, num_sequences),
            elite_values,
            positions,
            self.actions,
            result.weights,
            result.actions,
            result.mean,
            result.std,
            num_elites,
            temperature,
            min_std,
            max_std,
        )
        return result

    def _argument(self, first: int, last: int) -> ctypes.Array[SequencesArgument]:
        sizes = (*self.sizes, first, last, self.latents.shape[-1], self.action_dim)
        argument = SequencesArgument(*sizes, self._widest, self._dynamics.memory)
        return (SequencesArgument * 1)(argument)

    def _threads(self, rows: int, *networks: _Network | _Dynamics) -> int:
        """Threads for that many rows an environment."""
        each = sum(network.multiply_adds for network in networks)
        return product_threads(self.sizes[1] * rows * each)


@functools.cache
def _scratch_size(widest: int, memory: int) -> int:
    """Numbers that a thread needs for itself."""
    loaded = library()
    assert loaded is not None
    return int(loaded.planning_scratch(widest, memory))
