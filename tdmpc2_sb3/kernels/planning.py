"""A planner's search in one call: action sequences drawn, rolled out, valued, and drawn better.

A planner evaluates few rows by many small networks, and what lies between two of them (joining
inputs, squashing, discounting) would take as long as the networks do. ``kernels.c`` takes each
sequence through all of them.

Shapes: E environments, I iterations, N sequences of which P are the policy prior's and S = N - P
Gaussian samples, H horizon, A action, Z latent, K elites.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch as th

from tdmpc2_sb3.kernels.arguments import (
    Layer,
    NetworkArguments,
    arguments_of,
    lay_out,
    on_simplices,
    usable_layers,
    widest,
)
from tdmpc2_sb3.kernels.elementwise import copy_, join
from tdmpc2_sb3.kernels.interface import (
    SIMPLEX,
    DynamicsArgument,
    LayerArgument,
    NetworkArgument,
    SearchArgument,
    StateSpaceLayerArgument,
    Structure,
)
from tdmpc2_sb3.kernels.library import call, check_array, check_strides
from tdmpc2_sb3.kernels.products import MIN_ROWS, made_once, product_threads

SINGLE = ("features", "context", "starts", "action", "out")  # layers outside the stack
SIMPLEX_TOLERANCE = 1e-5  # of the sum of a simplex


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
    """State-space dynamics, see :mod:`tdmpc2_sb3.model.dynamics.ssm`."""

    features: Layer  # W_c
    context: Layer  # W_u
    starts: Layer  # P_1..P_L
    action: Layer  # W_a
    out: Layer  # W_o
    stack: Sequence[StateSpaceLayer]

    def layers(self) -> list[Layer]:
        """All that is multiplied."""
        result = [self.features, self.context, self.starts, self.action, self.out]  # SINGLE
        for _, _, _, products, selection, readout, mix, *_ in self.stack:
            result += [products, readout, mix]
            if selection is not None:
                result.append(selection)
        return result


def predicted_simplices(dynamics: Sequence[Layer] | StateSpace) -> int:
    """Of how many simplices a predicted latent consists; 0 if of something else."""
    last = dynamics.out if isinstance(dynamics, StateSpace) else dynamics[-1]
    return last.count_simplices()


class PlanningNetworks(NamedTuple):
    """What a planner evaluates."""

    dynamics: Sequence[Layer] | StateSpace  # of (z, a)
    reward: Sequence[Layer]  # of (z, a)
    policy: Sequence[Layer]  # of z, to 2 A
    q: Sequence[Layer]  # of (z, a), Q networks
    termination: Sequence[Layer] | None  # of z, if episodes end

    def dynamics_layers(self) -> Sequence[Layer]:
        """All layers of the dynamics."""
        dynamics = self.dynamics
        return dynamics.layers() if isinstance(dynamics, StateSpace) else dynamics

    def parts(self) -> list[Sequence[Layer]]:
        """The layers of each."""
        others = (self.reward, self.policy, self.q, self.termination)
        return [self.dynamics_layers(), *(each for each in others if each is not None)]

    def from_simplices(self, simplices: int) -> PlanningNetworks:
        """The same, known to be evaluated on that many simplices if all that are predicted from
        such latents consist of them too.

        :param simplices: of z_0, see :func:`tdmpc2_sb3.kernels.on_simplices`
        """
        dynamics = self.dynamics
        if not simplices or predicted_simplices(dynamics) != simplices:
            return self

        def of(layers: Sequence[Layer]) -> Sequence[Layer]:
            return on_simplices(layers, simplices)

        return PlanningNetworks(
            dynamics._replace(features=dynamics.features._replace(simplices=simplices))
            if isinstance(dynamics, StateSpace)
            else of(dynamics),
            of(self.reward),
            of(self.policy),
            of(self.q),
            None if self.termination is None else of(self.termination),
        )


def count_simplices(latent: th.Tensor) -> int:
    """Of how many simplices (see :func:`tdmpc2_sb3.kernels.on_simplices`) every latent consists; 0
    if one does not.

    :param latent: [E, Z]
    """
    if latent.shape[-1] % SIMPLEX:
        return 0
    distances = latent.reshape(-1, SIMPLEX).sum(1).sub_(1.0).abs_()
    return latent.shape[-1] // SIMPLEX if distances.max().item() < SIMPLEX_TOLERANCE else 0


def usable_plan(networks: PlanningNetworks) -> bool:
    """Whether ``kernels.c`` multiplies networks of these sizes."""
    return all(usable_layers(MIN_ROWS, each) for each in networks.parts())


class Draws(NamedTuple):
    """Random numbers of a search; along E they may be the same ones expanded, if all are."""

    policy: th.Tensor  # standard normal, [H, E, P, A]
    samples: th.Tensor  # standard normal, [I, H, E, S, A]
    terminal: th.Tensor  # standard normal, actions at z_H, [I, E, N, A]
    heads: th.Tensor  # Q heads, whose mean counts, [I, 2]


class SearchSettings(NamedTuple):
    """Settings of a search that its random numbers do not show."""

    num_elites: int  # K
    gamma: float  # discount a step
    temperature: float  # factor of the values in the exponents of the elites' weights
    min_std: float  # least standard deviation
    max_std: float  # greatest, and the first Gaussian's


class Elites(NamedTuple):
    """The best action sequences of an iteration, and what they make of the Gaussian."""

    values: th.Tensor  # the highest first, [E, K]
    weights: th.Tensor  # [E, K]
    actions: th.Tensor  # the first of each sequence, [E, K, A]
    previous_mean: th.Tensor  # of the Gaussian before, [H, E, A]
    mean: th.Tensor  # [H, E, A]
    std: th.Tensor  # [H, E, A]


def _network_argument(found: NetworkArguments) -> Structure:
    """A network as an argument, or several of the same sizes."""
    every = found.of(tuple(range(found.num_networks)))
    return NetworkArgument(layers=ctypes.addressof(every), count=found.num_layers)


def _stack_argument(
    dynamics: Sequence[Layer] | StateSpace, found: NetworkArguments
) -> ctypes.Array[Structure]:
    """Layers of a state space; none if the dynamics are a network.

    :param found: the dynamics' layers
    """
    stack = dynamics.stack if isinstance(dynamics, StateSpace) else ()
    rest = iter(found.of((0,))[len(SINGLE) :])
    layers = [_state_space_argument(layer, rest) for layer in stack]
    return (StateSpaceLayerArgument * len(layers))(*layers)


def _dynamics_argument(found: NetworkArguments, stack: ctypes.Array[Structure]) -> Structure:
    """Dynamics as an argument, which points to ``stack``."""
    argument = DynamicsArgument()
    if not len(stack):
        argument.net = _network_argument(found)
        return argument
    for name, layer in zip(SINGLE, found.of((0,))[: len(SINGLE)], strict=True):
        setattr(argument, name, layer)
    argument.stack, argument.depth = ctypes.addressof(stack), len(stack)
    return argument


def _state_space_argument(layer: StateSpaceLayer, arguments: Iterator[Structure]) -> Structure:
    """
    :param arguments: of its part of :meth:`StateSpace.layers`
    """
    products, readout, mix = (next(arguments) for _ in range(3))
    selection = LayerArgument() if layer.selection is None else next(arguments)
    return StateSpaceLayerArgument(
        gain=layer.gain.data_ptr(),
        shift=layer.shift.data_ptr(),
        products=products,
        selection=selection,
        readout=readout,
        mix=mix,
        alpha=layer.alpha.data_ptr(),
        omega=layer.omega.data_ptr(),
        beta=layer.beta.data_ptr(),
        modes=len(layer.alpha),
        eps=layer.eps,
    )


def _memory(dynamics: Sequence[Layer] | StateSpace) -> int:
    """Numbers a row of ``state_space_memory`` in kernels.c; 0 for a network."""
    if not isinstance(dynamics, StateSpace):
        return 0
    first, depth = dynamics.stack[0], len(dynamics.stack)
    width, modes = len(first.gain), len(first.alpha)
    states = 2 * modes * depth
    hidden = len(first.readout.weight)
    if first.selection is not None:
        hidden = max(hidden, first.selection.weight.shape[1])
    of_start = len(dynamics.features.weight) + width + states
    return max(of_start, 2 * width + len(first.products.weight) + modes + hidden + states)


def _check(
    networks: PlanningNetworks,
    bins: th.Tensor,
    start: th.Tensor,
    initial_mean: th.Tensor,
    draws: Draws,
    num_elites: int,
) -> None:
    """That what :func:`search` reads fits together.

    :raises RuntimeError: naming what does not
    """
    horizon, num_envs = len(draws.policy), len(start)
    num_iterations, _, num_samples, _ = draws.terminal.shape
    num_prior, action_dim = draws.policy.shape[2], networks.policy[-1].weight.shape[-2] // 2
    latent_dim = networks.policy[0].weight.shape[-1]
    num_gaussian, pair_dim = num_samples - num_prior, latent_dim + action_dim
    shapes: dict[str, tuple[th.Tensor, tuple[int, ...]]] = {
        "The plan that is gone on with": (initial_mean, (horizon, num_envs, action_dim)),
        "The latent": (start, (num_envs, latent_dim)),
        "The policy's noise": (draws.policy, (horizon, num_envs, num_prior, action_dim)),
        "The samples' noise": (
            draws.samples,
            (num_iterations, horizon, num_envs, num_gaussian, action_dim),
        ),
        "The last actions' noise": (
            draws.terminal,
            (num_iterations, num_envs, num_samples, action_dim),
        ),
        "The bins": (bins, (networks.reward[-1].weight.shape[-2],)),
    }
    for what, (x, shape) in shapes.items():
        check_array(what, x, shape)
    check_array("The Q heads", draws.heads, (num_iterations, 2), th.int64)
    check_strides("The bins", bins)
    ends = [(networks.reward, pair_dim), (networks.q, pair_dim), (networks.policy, latent_dim)]
    if networks.termination is not None:
        ends.append((networks.termination, latent_dim))
    if isinstance(networks.dynamics, StateSpace):
        last = networks.dynamics.out
        ends += [
            ([networks.dynamics.features], latent_dim),
            ([networks.dynamics.action], action_dim),
        ]
    else:
        last = networks.dynamics[-1]
        ends.append((networks.dynamics, pair_dim))
    sizes = [(layers[0].weight.shape[-1], wanted) for layers, wanted in ends]
    sizes += [(last.weight.shape[-2], latent_dim), (networks.q[-1].weight.shape[-2], len(bins))]
    for size, wanted in sizes:
        if size != wanted:
            raise RuntimeError(f"A network that is planned with has {size} numbers, not {wanted}.")
    if not 0 < num_elites <= num_samples:
        raise RuntimeError(f"{num_elites} elites cannot be among {num_samples} sequences.")


def search(
    networks: PlanningNetworks,
    bins: th.Tensor,
    start: th.Tensor,
    initial_mean: th.Tensor,
    draws: Draws,
    settings: SearchSettings,
) -> Elites:
    """The last iteration's elites; weights must be fixed (``fixed_weights``).

    :param networks: that :func:`usable_plan` agrees to
    :param bins: values of the bins of reward and Q
    :param start: z_0, [E, Z]
    :param initial_mean: of the first Gaussian, [H, E, A]
    :param draws: random numbers
    :param settings: of the search
    :raises RuntimeError: if sizes do not fit together
    """
    num_elites = settings.num_elites
    _check(networks, bins, start, initial_mean, draws, num_elites)
    horizon, num_envs, action_dim = initial_mean.shape
    num_iterations, _, num_samples, _ = draws.terminal.shape
    num_prior, latent_dim = draws.policy.shape[2], start.shape[-1]
    noise_envs = num_envs
    if draws.policy.stride(1) == draws.samples.stride(2) == draws.terminal.stride(1) == 0:
        noise_envs = 1
        draws = Draws(
            draws.policy[:, :1], draws.samples[:, :, :1], draws.terminal[:, :1], draws.heads
        )
    draws = Draws(*(each.contiguous() for each in draws))
    start = start.contiguous()
    simplices = networks.reward[0].simplices
    if simplices:  # without the last number of each
        start = join([start.unflatten(-1, (-1, SIMPLEX))[..., :-1]])

    parts = networks.parts()
    dynamics, reward, policy, q, *termination = map(arguments_of, parts)
    every_head = tuple(range(q.num_networks))  # each is drawn in one iteration or another
    lay_out(*((each, (0,)) for each in (dynamics, reward, policy, *termination)), (q, every_head))
    stack = _stack_argument(networks.dynamics, dynamics)
    made_once((search, id(stack)), lambda: (stack, networks))  # to which the call points
    step = sum(each.multiply_adds for each in (dynamics, reward, *termination))
    value = policy.multiply_adds + 2 * q.multiply_adds

    empty = start.new_empty
    means, stds = empty(2, num_iterations + 1, horizon, num_envs, action_dim)
    copy_(initial_mean.contiguous(), means[0])
    result = Elites(
        empty(num_envs, num_elites),
        empty(num_envs, num_elites),
        empty(num_envs, num_elites, action_dim),
        means[-2],
        means[-1],
        stds[-1],
    )
    actions = empty(horizon, num_envs, num_samples, action_dim)
    prior_latents = empty(num_envs, num_prior, latent_dim)
    rewards, discounts, values = empty(3, num_envs, num_samples)
    positions = empty(num_envs, num_elites, dtype=th.long)
    valued = empty(num_envs, dtype=th.long)
    argument = SearchArgument(
        iterations=num_iterations,
        horizon=horizon,
        envs=num_envs,
        samples=num_samples,
        prior=num_prior,
        elites=num_elites,
        noise_envs=noise_envs,
        latent_dim=latent_dim,
        action_dim=action_dim,
        simplices=simplices,
        widest=max(map(widest, parts)),
        memory=_memory(networks.dynamics),
        steps_work=horizon * step,
        prior_work=horizon * (step + policy.multiply_adds),
        value_work=value,
        dynamics=_dynamics_argument(dynamics, stack),
        reward=_network_argument(reward),
        policy=_network_argument(policy),
        termination=_network_argument(*termination) if termination else NetworkArgument(),
        q=_network_argument(q),
        bins=bins.data_ptr(),
        start=start.data_ptr(),
        policy_noise=draws.policy.data_ptr(),
        sample_noise=draws.samples.data_ptr(),
        terminal_noise=draws.terminal.data_ptr(),
        heads=draws.heads.data_ptr(),
        actions=actions.data_ptr(),
        prior_latents=prior_latents.data_ptr(),
        rewards=rewards.data_ptr(),
        discounts=discounts.data_ptr(),
        values=values.data_ptr(),
        means=means.data_ptr(),
        stds=stds.data_ptr(),
        elite_values=result.values.data_ptr(),
        weights=result.weights.data_ptr(),
        first_actions=result.actions.data_ptr(),
        positions=positions.data_ptr(),
        valued=valued.data_ptr(),
        scratch=None,  # below, once its size is known
        gamma=settings.gamma,
        temperature=settings.temperature,
        min_std=settings.min_std,
        max_std=settings.max_std,
    )
    arguments = (SearchArgument * 1)(argument)
    threads = product_threads(num_envs * num_samples * (horizon * step + value))
    scratch = empty(threads * call("planning_scratch", arguments))
    arguments[0].scratch = scratch.data_ptr()
    call("plan_search", arguments, threads)
    return result


def choose_action(
    elites: Elites, gumbel: th.Tensor, exploration: th.Tensor | None
) -> tuple[th.Tensor, ...]:
    """The fields of :class:`tdmpc2_sb3.planner.Plan`, with the action of an elite that is chosen by
    its weight.

    :param elites: of :func:`search`
    :param gumbel: standard Gumbel, [E, K]
    :param exploration: standard normal, times the first step's deviation, [E, A]; None for no
        exploration
    """
    horizon, num_envs, action_dim = elites.mean.shape
    check_array("The choice's noise", gumbel, elites.weights.shape)
    if exploration is not None:
        check_array("The exploration", exploration, (num_envs, action_dim))
    empty = elites.mean.new_empty
    action, (mean, std) = empty(num_envs, action_dim), empty(2, num_envs, horizon, action_dim)
    fields = action, mean, std, *empty(4, num_envs)
    sizes = num_envs, elites.weights.shape[1], horizon, action_dim
    drawn = gumbel.contiguous(), None if exploration is None else exploration.contiguous()
    call("choose_action", *elites, *drawn, *fields, *sizes)
    return fields
