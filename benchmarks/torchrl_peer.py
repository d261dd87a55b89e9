"""TorchRL's TD-MPC2 at the sizes of one of our settings: planning and updating, for speed.py.

It is in their nightly wheels (``pip install torchrl-nightly tensordict-nightly hydra-core``). Their
own factories build the networks, and their trainer's stepper makes the update.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch as th

from tdmpc2_sb3 import TDMPC2


def plan_and_update(
    ours: TDMPC2, observation_dim: int, action_dim: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions that plan one action and make one update, on data drawn once.

    :param ours: the agent of which sizes, batch and planner are taken
    :param observation_dim: of a vector
    :param action_dim: A
    """
    from tensordict import TensorDict
    from torchrl.modules import TdMpc2Planner
    from torchrl.objectives import TdMpc2Loss
    from torchrl.trainers.algorithms import tdmpc2 as trainer
    from torchrl.trainers.algorithms.configs import modules

    device = ours.device
    size = ours.policy.world_model.architecture
    sizes = {"latent_dim": size.latent_dim, "action_dim": action_dim, "mlp_dim": size.mlp_dim}
    world_model = modules._make_tdmpc2_world_model(
        observation_dim=observation_dim,
        encoder_dim=size.enc_dim,
        encoder_depth=size.num_enc_layers - 1,
        simnorm_dim=size.simnorm_dim,
        num_bins=size.num_bins,
        device=device,
        **sizes,
    )
    prior = modules._make_tdmpc2_policy_prior(device=device, **sizes)
    q_ensemble = modules._make_tdmpc2_q_ensemble(
        num_q=size.num_q,
        num_bins=size.num_bins,
        dropout=size.dropout,
        device=device,
        **sizes,
    )
    config = ours.policy.planner  # "auto" is resolved there
    horizon, discount = config.horizon, config.gamma
    loss = TdMpc2Loss(world_model, prior, q_ensemble, horizon=horizon, discount=discount)
    planner = TdMpc2Planner(
        world_model,
        prior,
        q_ensemble,
        horizon=horizon,
        discount=discount,
        num_samples=config.num_samples,
        num_elites=config.num_elites,
        num_pi_trajs=config.num_pi_trajs,
        iterations=config.num_iterations,
    )
    rate = float(ours.learning_rate)
    encoder = list(world_model.encoder.parameters())
    others = [
        *world_model.dynamics.parameters(),
        *world_model.reward_head.parameters(),
        *q_ensemble.q_params.parameters(),
    ]
    stepper = trainer.TdMpc2OptimizationStepper(
        loss,
        th.optim.Adam(
            [{"params": encoder, "lr": rate * ours.enc_lr_scale}, {"params": others}], lr=rate
        ),
        th.optim.Adam(prior.parameters(), lr=rate, eps=1e-5),
        target_tau=ours.tau,
    )
    as_trainer = SimpleNamespace(loss_module=loss, clip_grad_norm=True, clip_norm=20.0)

    generator = th.Generator().manual_seed(0)
    shape = (ours.batch_size, horizon)
    transitions = TensorDict(
        {
            "observation": th.randn(*shape, observation_dim, generator=generator),
            "action": th.rand(*shape, action_dim, generator=generator) * 2 - 1,
            "next": TensorDict(
                {
                    "observation": th.randn(*shape, observation_dim, generator=generator),
                    "reward": th.rand(*shape, 1, generator=generator),
                    "terminated": th.zeros(*shape, 1, dtype=th.bool),
                },
                batch_size=shape,
            ),
        },
        batch_size=shape,
    ).to(device)
    acting = TensorDict(
        {
            "observation": th.randn(1, observation_dim, generator=generator),
            "is_init": th.zeros(1, 1, dtype=th.bool),
            planner.prev_mean_key: th.zeros(1, horizon, action_dim),
        },
        batch_size=(1,),
    ).to(device)

    @th.no_grad()
    def plan() -> Any:
        return planner(acting.clone(recurse=False))

    def update() -> Any:
        return stepper.step(as_trainer, transitions)

    return plan, update
