"""Models of any sizes, whose plans and gradients by the kernels are compared with plain torch.

The comparison is with the same functions in double precision, of which no part goes by the
kernels. Run as a program, it takes the sizes that :data:`CASES` lists, one call of ``kernels.c``
after the other and without captures, so that every array lies in memory of its own: for a build
that watches its memory.
"""

from __future__ import annotations

import copy
import sys
from typing import NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.fast.gradients import DirectGradients
from tdmpc2_sb3.fast.plans import DirectPlanning
from tdmpc2_sb3.losses import (
    LossConfig,
    UpdateNoise,
    model_losses,
    policy_loss,
    sample_update_noise,
    step_weights,
)
from tdmpc2_sb3.model.world_model import Architecture, WorldModel
from tdmpc2_sb3.planner import PlannerConfig, PlanNoise, plan, sample_plan_noise
from tdmpc2_sb3.replay.buffer import SequenceBatch

TAU = 0.02


class Sizes(NamedTuple):
    """Of a model, its batches and its plans."""

    observation: int = 5
    action: int = 3
    simplices: int = 2
    simnorm_dim: int = 8
    enc_dim: int = 12
    mlp_dim: int = 24
    num_enc_layers: int = 2
    num_q: int = 2
    num_bins: int = 21
    dynamics: str = "mlp"
    depth: int = 2  # of state-space dynamics, like the next
    selective: bool = True
    width: int | None = None  # found from the MLP's parameters, like the next two
    modes: int | None = None
    conditioning: int | None = None
    episodic: bool = False
    rows: int = 4  # of a batch
    horizon: int = 3  # of plans and batches
    envs: int = 1
    samples: int = 12
    prior: int = 3
    elites: int = 4
    iterations: int = 2


#: Every size at its least and at uncommon ones, above all many actions.
CASES = [
    Sizes(action=action, simplices=simplices, mlp_dim=24, rows=rows, dynamics=dynamics)
    for action, simplices, rows in [
        (1, 1, 1),
        (89, 16, 1),
        (110, 16, 3),
        (152, 2, 2),
        (153, 16, 2),
        (217, 7, 9),
        (380, 15, 4),
    ]
    for dynamics in ("mlp", "ssm")
]
CASES += [
    Sizes(observation=1, samples=1, elites=1, prior=0, iterations=1, horizon=1, rows=1),
    Sizes(observation=700, action=37, simplices=19, horizon=12, samples=300, elites=1, prior=299),
    Sizes(observation=33, simplices=37, simnorm_dim=3, mlp_dim=101, enc_dim=65, num_enc_layers=1),
    Sizes(simplices=9, simnorm_dim=1, num_bins=2, num_q=1, episodic=True, envs=3, rows=40),
    Sizes(num_q=70, num_enc_layers=9, enc_dim=7, mlp_dim=5, rows=2, horizon=2),
    Sizes(dynamics="ssm", depth=1, action=1, simplices=3, horizon=12, envs=2, elites=12),
    Sizes(dynamics="ssm", selective=False, depth=3, action=130, simplices=5, episodic=True),
    Sizes(dynamics="ssm", action=301, simplices=29, rows=1, horizon=1, samples=261, elites=261),
    Sizes(mlp_dim=257, enc_dim=129, action=20, rows=70, horizon=4, samples=270, prior=30),
]


def make_model(sizes: Sizes) -> WorldModel:
    """A model whose heads are not zero."""
    th.manual_seed(0)
    architecture = Architecture(
        sizes.simplices * sizes.simnorm_dim,
        sizes.enc_dim,
        sizes.mlp_dim,
        sizes.num_enc_layers,
        sizes.num_q,
        sizes.simnorm_dim,
        sizes.num_bins,
        dropout=0.05,
    )
    names = ("depth", "selective", "width", "modes", "conditioning")
    more = {name: getattr(sizes, name) for name in names} if sizes.dynamics == "ssm" else {}
    space = spaces.Box(-np.inf, np.inf, (sizes.observation,), np.float32)
    model = WorldModel(
        space, sizes.action, architecture, sizes.dynamics, more, episodic=sizes.episodic
    )
    with th.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * th.randn(parameter.shape))
    return model


def in_double(model: WorldModel) -> WorldModel:
    """The same, of which the kernels take no part."""
    exact = copy.deepcopy(model).double()
    exact.bins = model.bins.double()
    return exact


def doubled(values: NamedTuple) -> NamedTuple:
    """With floating-point tensors in double precision, those within too."""
    parts = []
    for each in values:
        if isinstance(each, tuple) and hasattr(each, "_fields"):
            each = doubled(each)  # type: ignore[arg-type]
        elif isinstance(each, th.Tensor) and each.is_floating_point():
            each = each.double()
        parts.append(each)
    return type(values)(*parts)


def assert_close(ours: th.Tensor, theirs: th.Tensor, what: str, least_scale: float) -> None:
    """Relative to the largest number."""
    assert ours.shape == theirs.shape, what
    if theirs.numel():
        scale = max(least_scale, float(theirs.abs().max()))
        difference = float((ours.double() - theirs).abs().max())
        assert difference <= 3e-4 * scale, (what, difference, scale)


def compare_plans(sizes: Sizes) -> bool:
    """Plans by the kernels with those of plain torch; returns whether the kernels make them."""
    model = make_model(sizes)
    config = PlannerConfig(
        sizes.horizon, sizes.samples, sizes.elites, sizes.prior, sizes.iterations, gamma=0.9
    )
    direct = DirectPlanning(model)
    if not direct.takes(config):
        return False
    exact = in_double(model)
    for turn in range(2):  # captured, replayed
        generator = th.Generator().manual_seed(turn)
        noise = sample_plan_noise(model, config, sizes.envs, generator)
        noise = noise._replace(gumbel=th.zeros_like(noise.gumbel))  # see test_planner.py
        observation = th.randn(sizes.envs, sizes.observation, generator=generator)
        mean = th.rand(sizes.envs, sizes.horizon, sizes.action, generator=generator) - 0.5
        ours = direct.plan(observation, mean, noise, config, explore=True)
        exact_noise: PlanNoise = doubled(noise)  # type: ignore[assignment]
        latent = exact.encode(observation.double())
        theirs = plan(exact, latent, mean.double(), exact_noise, config, explore=True)
        for name, value in theirs._asdict().items():
            assert_close(getattr(ours, name), value, name, 0.1)
    return True


def compare_updates(sizes: Sizes) -> None:
    """Losses and gradients by the kernels with those that autograd takes."""
    model = make_model(sizes)
    config = LossConfig(gamma=0.97, entropy_coef=0.1, entropy="gaussian")
    squashed_config = config._replace(entropy="squashed")
    direct, squashed = (DirectGradients(model, each) for each in (config, squashed_config))
    exact, single = in_double(model), copy.deepcopy(model)
    steps, rows = sizes.horizon, sizes.rows
    weights = step_weights(steps, steps, 0.5, True)
    generator = th.Generator().manual_seed(3)
    noise = sample_update_noise(model, steps, rows, generator)
    for _ in range(2):  # captured, replayed
        batch = SequenceBatch(
            th.randn(steps + 1, rows, sizes.observation, generator=generator),
            th.rand(steps, rows, sizes.action, generator=generator) * 2 - 1,
            th.randn(steps, rows, generator=generator),
            (th.rand(steps, rows, generator=generator) < 0.3).float(),
            None,
        )
        expected = model_losses(
            exact, doubled(batch), doubled(noise), config, weights.double()  # type: ignore[arg-type]
        )  # fmt: skip
        theirs = [each for each in exact.parameters() if each.requires_grad]
        gradients = th.autograd.grad(expected.total, theirs, allow_unused=True)
        for each in model.parameters():
            each.grad = None
        with kernels.fixed_weights():
            losses, _ = direct.model_losses(batch, noise, weights)
        assert_close(losses.total, expected.total.detach(), "total", 0.02)
        assert_close(losses.latents, expected.latents, "latents", 0.1)
        _compare_gradients(model, gradients)

        compare_priors(model, direct, exact, config, expected.latents, noise)
        compare_priors(model, squashed, single, squashed_config, expected.latents, noise)


def compare_priors(
    model: WorldModel,
    direct: DirectGradients,
    plain: WorldModel,
    config: LossConfig,
    latents: th.Tensor,
    noise: UpdateNoise,
) -> None:
    """The policy's loss and gradients by the kernels with those that autograd takes.

    :param plain: the same model in the precision of autograd. That is single where the entropy is
        of squashed actions: 1 - a^2 is rounded off at the bounds, for the one as for the other
    """
    dtype = plain.bins.dtype
    weights, scale = step_weights(len(latents), len(latents) - 1, 0.5, True), th.tensor(1.5)
    policy_noise = noise.policy
    assert policy_noise is not None
    prior = policy_loss(
        plain,
        latents.to(dtype),
        scale.to(dtype),
        doubled(policy_noise) if dtype is th.float64 else policy_noise,  # type: ignore[arg-type]
        config,
        weights.to(dtype),
        TAU,
    )
    theirs = {name: each for name, each in plain.named_parameters() if each.requires_grad}
    of_prior = [each for name, each in theirs.items() if name.startswith("policy_net")]
    taken = iter(th.autograd.grad(prior.total, of_prior))
    gradients = tuple(next(taken) if n.startswith("policy_net") else None for n in theirs)
    for each in model.parameters():
        each.grad = None
    with kernels.fixed_weights():
        ours, _ = direct.policy_loss(latents.float(), scale, policy_noise, weights, TAU)
    assert_close(ours.total, prior.total.detach(), "policy", 0.02)
    _compare_gradients(model, gradients)


def _compare_gradients(model: WorldModel, theirs: tuple[th.Tensor | None, ...]) -> None:
    ours = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    for (name, parameter), gradient in zip(ours, theirs, strict=True):
        if gradient is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert_close(parameter.grad, gradient, name, 0.05)


def main() -> None:
    """All of :data:`CASES`, with the compiler's flags that are given."""
    from tdmpc2_sb3.kernels import capture, library
    from tdmpc2_sb3.kernels.library import FLAGS
    from tdmpc2_sb3.kernels.products import fixed_weights_anew

    def call(self: kernels.Captured[object], *arguments: object) -> object:
        with fixed_weights_anew():
            return self._function(*arguments)

    capture.Captured.__call__ = call  # type: ignore[method-assign]
    sys.modules[library.__module__].FLAGS = (*FLAGS, *sys.argv[1:])  # type: ignore[attr-defined]
    assert library() is not None
    planned = 0
    for sizes in CASES:
        planned += compare_plans(sizes)
        compare_updates(sizes)
    print(f"{len(CASES)} cases, {planned} planned by the kernels")


if __name__ == "__main__":
    main()
