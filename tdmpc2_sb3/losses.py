"""One gradient step's losses as functions of the model, a batch and the random numbers.

Every random number is drawn beforehand by :func:`sample_update_noise`, so that the same losses can
be computed again, compiled or plain, and compared.

Shapes: T training horizon, B batch, A action, Z latent, K bins, Q heads.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch as th
import torch.nn.functional as F

from tdmpc2_sb3.model.discrete_regression import two_hot_cross_entropy, two_hot_inverse
from tdmpc2_sb3.model.encoders import Observation
from tdmpc2_sb3.model.operations import (
    ENTROPY_EPSILON,
    SCALE_HIGH,
    SCALE_LOW,
    Dropped,
    has_kernel,
)
from tdmpc2_sb3.model.world_model import PolicySample, WorldModel
from tdmpc2_sb3.replay.buffer import SequenceBatch
from tdmpc2_sb3.settings import is_in_use

REFERENCE_HORIZON = 3


class LossConfig(NamedTuple):
    """Coefficients of the losses; the defaults are the paper's (TD-MPC2, table 7).

    A field is an argument of :class:`tdmpc2_sb3.TDMPC2`, too, by being here.
    """

    gamma: float = 0.99
    consistency_coef: float = 20.0
    reward_coef: float = 0.1
    value_coef: float = 0.1
    termination_coef: float = 1.0
    entropy_coef: float = 1e-4
    entropy: str = "squashed"  # see scaled_entropy
    encoded_terminations: bool = False  # see model_losses
    td_lambda: float = 0.0  # see td_targets


class PolicyNoise(NamedTuple):
    """Random numbers of one step of the policy prior."""

    action: th.Tensor  # [T + 1, B, A]
    heads: th.Tensor  # [2]
    dropout: Dropped | None  # [2, (T + 1) B, hidden]


class UpdateNoise(NamedTuple):
    """All random numbers of one gradient step."""

    next_action: th.Tensor  # [T, B, A]
    target_heads: th.Tensor  # [2]
    q_dropout: Dropped | None  # [Q, T B, hidden]
    policy: PolicyNoise | None  # None if the policy prior takes no step
    first_offsets: th.Tensor | None  # [images, B, 2]
    next_offsets: th.Tensor | None  # [images, T B, 2]


class Prediction(NamedTuple):
    """What a batch's sub-sequences are in the world model, of which each loss is a function."""

    model: WorldModel
    batch: SequenceBatch
    noise: UpdateNoise
    config: LossConfig
    weights: th.Tensor  # of the steps, [T]
    states: th.Tensor  # z_0..z_{T-1}, of which z_0 is encoded, [T, B, Z]
    predicted: th.Tensor  # z_1..z_T, [T, B, Z]
    encoded: th.Tensor  # the next observations' latents, [T, B, Z]; see model_losses
    targets: th.Tensor  # of the Q heads, [T, B]


class ModelLosses(NamedTuple):
    """Losses of the world model, and the latents that the policy is trained on."""

    total: th.Tensor
    terms: dict[str, th.Tensor]  # by name, before their coefficients, detached
    latents: th.Tensor  # z_0..z_T, detached, [T + 1, B, Z]


class PolicyLosses(NamedTuple):
    """Loss of the policy prior and what is logged about it."""

    total: th.Tensor
    entropy: th.Tensor  # mean of -log pi
    scaled_entropy: th.Tensor
    scale: th.Tensor  # S after its update


def step_weights(num_steps: int, train_horizon: int, rho: float, horizon_aware: bool) -> th.Tensor:
    """Weights of the steps of a sub-sequence in a loss that sums over them.

    The reference uses rho^t / n. That all but ignores steps beyond the third; horizon-aware
    weights decay so that the last step of any horizon weighs what the third of three does,
    rho_T = rho^(2 / (T - 1)), and keep the sum of the reference at T = 3, so that T = 3 is the
    reference exactly.

    :param num_steps: n, T for the model's losses and T + 1 for the policy's
    :param train_horizon: T
    :param rho: decay a step of the reference
    :param horizon_aware: whether to adapt the decay to T
    :return: [n]
    """
    steps = th.arange(num_steps, dtype=th.float32)
    if not horizon_aware or train_horizon == REFERENCE_HORIZON:
        return rho**steps / num_steps
    decay = 1.0 if train_horizon == 1 else rho ** (2.0 / (train_horizon - 1))
    reference_steps = REFERENCE_HORIZON + num_steps - train_horizon
    reference_sum = sum(rho**t for t in range(reference_steps)) / reference_steps
    weights = decay**steps
    return weights / weights.sum() * reference_sum


def sample_update_noise(
    model: WorldModel,
    train_horizon: int,
    batch_size: int,
    generator: th.Generator,
    with_policy: bool = True,
) -> UpdateNoise:
    """Draws the random numbers of one gradient step on the generator's device.

    :param model: that learns
    :param train_horizon: T
    :param batch_size: B
    :param generator: which is moved on
    :param with_policy: whether the policy prior takes a step too
    """
    steps, rows, device = train_horizon, batch_size, generator.device
    ensemble = model.q_ensemble

    def normal(num_steps: int) -> th.Tensor:
        shape = (num_steps, rows, model.action_dim)
        return th.randn(shape, generator=generator, device=device, dtype=th.float32)

    policy: PolicyNoise | None = None
    if with_policy:
        policy = PolicyNoise(
            action=normal(steps + 1),
            heads=model.sample_heads(generator)[0],
            dropout=ensemble.sample_dropout(2, (steps + 1) * rows, generator),
        )
    return UpdateNoise(
        next_action=normal(steps),
        target_heads=model.sample_heads(generator)[0],
        q_dropout=ensemble.sample_dropout(ensemble.num_q, steps * rows, generator),
        policy=policy,
        first_offsets=model.encoder.sample_offsets(rows, generator),
        next_offsets=model.encoder.sample_offsets(steps * rows, generator),
    )


def observations_at(observations: Observation, index: int | slice) -> Observation:
    """Those of one step, or of some, of observations with a leading axis of steps."""
    if isinstance(observations, dict):
        return {key: value[index] for key, value in observations.items()}
    return observations[index]


def _mean(values: th.Tensor, valid: th.Tensor | None) -> th.Tensor:
    """Mean over the batch [B] of the steps' values; steps that are not valid count as 0.

    Shapes: values [..., T, B], valid [T, B], result [..., T].
    """
    return (values if valid is None else values * valid).mean(-1)


@th.no_grad()
def td_targets(
    model: WorldModel,
    next_latents: th.Tensor,
    batch: SequenceBatch,
    noise: UpdateNoise,
    config: LossConfig,
) -> th.Tensor:
    """Targets of the Q heads, [T, B].

    The reference's are r + gamma (1 - d) V(z'), V the lesser of two target Q heads at
    (z', a' ~ pi(z')). With lambda > 0 they are lambda-returns (Sutton and Barto, section 12.1) cut
    off at the sub-sequence's end, G_t = r_t + gamma (1 - d_t) ((1 - lambda) V(z_t+1) +
    lambda G_t+1) with G_T = V(z_T): rewards reach earlier values in fewer updates, but those after
    the first stem from the actions that were taken, not from the policy prior's.
    """
    used = bootstrapped_steps(config)
    latents = next_latents[used]
    actions = model.policy_action(latents, noise.next_action[used])
    values = model.target_q_values(latents, actions, noise.target_heads).amin(0)
    return lambda_returns(values, batch.rewards, batch.terminations, config.gamma, config.td_lambda)


def bootstrapped_steps(config: LossConfig) -> slice:
    """The steps whose next latents' values :func:`lambda_returns` reads."""
    return slice(-1, None) if config.td_lambda == 1.0 else slice(None)


@has_kernel("lambda_returns")
def lambda_returns(
    values: th.Tensor,
    rewards: th.Tensor,
    terminations: th.Tensor,
    gamma: float,
    td_lambda: float,
) -> th.Tensor:
    """The targets of :func:`td_targets`, [T, B].

    :param values: V(z') of :func:`bootstrapped_steps`, [1 or T, B]
    :param rewards: [T, B]
    :param terminations: 1 where the episode ended, [T, B]
    :param gamma: discount factor
    :param td_lambda: lambda
    """
    discounts = gamma * (1.0 - terminations)
    if td_lambda == 0.0:
        return rewards + discounts * values
    targets = th.empty_like(rewards)
    future = values[-1]
    for t in reversed(range(len(targets))):
        if td_lambda < 1.0:
            future = th.lerp(values[t], future, td_lambda)
        future = rewards[t] + discounts[t] * future
        targets[t] = future
    return targets


Term: TypeAlias = Callable[[Prediction], th.Tensor | None]

_terms: dict[str, Term] = {}
#: The losses that add up to the world model's, by name.
TERMS = MappingProxyType(_terms)


def term(function: Term) -> Term:
    """Decorates a function ``<name>_loss``, which becomes a term of the world model's loss.

    The field ``<name>_coef`` of :class:`LossConfig` is its coefficient, and it is logged as
    ``train/<name>_loss``. A term that is None does not go with the model.

    :raises TypeError: if there is no such field, or if it is another loss's
    """
    name = function.__name__.removesuffix("_loss")
    if f"{name}_coef" not in LossConfig._fields:
        raise TypeError(f"{function.__name__} has no coefficient: give LossConfig a {name}_coef.")
    if name in (*_terms, "entropy"):  # the latter is in the policy's loss
        raise TypeError(
            f"{name}_coef is another loss's, which fast ways compute by themselves: give "
            f"{function.__name__} another name, and set {name}_coef to 0 to do without the other."
        )
    _terms[name] = function
    return function


@term
def consistency_loss(prediction: Prediction) -> th.Tensor:
    """Squared error of predicted latents against encoded ones."""
    encoded = prediction.encoded.detach()
    squared_error = F.mse_loss(prediction.predicted, encoded, reduction="none")
    return weighted(squared_error.mean(2), prediction)


@term
def reward_loss(prediction: Prediction) -> th.Tensor:
    """Cross-entropy of the predicted rewards."""
    model, rewards = prediction.model, prediction.batch.rewards
    logits = model.reward_logits(prediction.states, prediction.batch.actions)  # [T, B, K]
    return weighted(two_hot_cross_entropy(logits, rewards, model.bins), prediction)


@term
def value_loss(prediction: Prediction) -> th.Tensor:
    """Cross-entropy of the Q heads, mean over them."""
    model, actions = prediction.model, prediction.batch.actions
    logits = model.q_logits(prediction.states, actions, None, prediction.noise.q_dropout)
    cross_entropy = two_hot_cross_entropy(logits, prediction.targets, model.bins)  # [Q, T, B]
    return weighted(cross_entropy, prediction)


@term
def termination_loss(prediction: Prediction) -> th.Tensor | None:
    """Binary cross-entropy of the termination head, where there is one."""
    model, batch = prediction.model, prediction.batch
    if not model.episodic:
        return None
    both = prediction.config.encoded_terminations
    latents = [prediction.predicted, prediction.encoded] if both else [prediction.predicted]
    logits = model.termination_logit(th.stack(latents))  # [2 or 1, T, B]
    ended = batch.terminations.expand_as(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, ended, reduction="none")
    return _mean(cross_entropy, batch.valid).mean()


def weighted(values: th.Tensor, prediction: Prediction) -> th.Tensor:
    """Sum over the weighted steps of the batch's mean, and of the heads' if there are any, [].

    :param values: [T, B] or [Q, T, B]
    """
    means = _mean(values, prediction.batch.valid)
    return (prediction.weights * (means.mean(0) if means.dim() > 1 else means)).sum()


def model_losses(
    model: WorldModel,
    batch: SequenceBatch,
    noise: UpdateNoise,
    config: LossConfig,
    weights: th.Tensor,
) -> ModelLosses:
    """The world model's loss, the sum of :data:`TERMS` times their coefficients (TD-MPC2, eq. 3).

    The reference encodes observations with gradients as a sub-sequence's first alone, which a
    terminal one never is. Dynamics and termination head then agree on a mark of their own that no
    encoded state bears, and that unseen terminations lack. With ``config.encoded_terminations`` the
    head learns from the encoded next observations as well, and the encoder from the head.

    A term that is left out by default is not computed before it has a coefficient.

    :param model: in which gradients are recorded, targets apart
    :param batch: sub-sequences that stay within an episode
    :param noise: of :func:`sample_update_noise`
    :param config: coefficients
    :param weights: of :func:`step_weights`, [T]
    """
    classifies_encoded = model.episodic and config.encoded_terminations
    with th.set_grad_enabled(classifies_encoded and th.is_grad_enabled()):
        encoded = model.encode(
            observations_at(batch.observations, slice(1, None)), noise.next_offsets
        )
    targets = td_targets(model, encoded.detach(), batch, noise, config)
    latent = model.encode(observations_at(batch.observations, 0), noise.first_offsets)  # z_0 [B, Z]
    predicted = model.dynamics.rollout(model.dynamics.initial_state(latent), batch.actions)
    states = th.cat([latent.unsqueeze(0), predicted[:-1]])
    prediction = Prediction(
        model, batch, noise, config, weights, states, predicted, encoded, targets
    )
    terms: dict[str, th.Tensor] = {}
    for name, function in TERMS.items():
        loss = function(prediction) if is_in_use(config, f"{name}_coef") else None
        if loss is not None:
            terms[name] = loss
    summands = [getattr(config, f"{name}_coef") * loss for name, loss in terms.items()]
    return ModelLosses(
        sum(summands[1:], summands[0]),
        {name: loss.detach() for name, loss in terms.items()},
        th.cat([states.detach(), predicted[-1:].detach()]),
    )


def updated_scale(scale: th.Tensor, q: th.Tensor, tau: float) -> th.Tensor:
    """S moved by tau towards the 5th-95th percentile range of Q, at least 1.

    :param scale: S, []
    :param q: Q at the sub-sequences' first step, [B]
    """
    ordered = q.sort().values
    last = ordered.shape[0] - 1

    def percentile(share: float) -> th.Tensor:
        position = share * last
        low = int(position)
        return th.lerp(ordered[low], ordered[min(low + 1, last)], position - low)

    return th.lerp(scale, (percentile(SCALE_HIGH) - percentile(SCALE_LOW)).clamp_min(1.0), tau)


def alive_states(batch: SequenceBatch) -> th.Tensor | None:
    """1 where a state is followed by actions, 0 from a termination on, [T + 1, B].

    None for sub-sequences that never run past a termination: the reference trains the policy in
    all of their states.
    """
    if batch.valid is None:
        return None
    alive = batch.valid * (1.0 - batch.terminations)
    return th.cat([th.ones_like(alive[:1]), alive])


def scaled_entropy(sample: PolicySample, entropy: str) -> th.Tensor:
    """What the policy's loss rewards beside Q, [...].

    With A action dimensions, g the log-probability of the Gaussian draw u and p = g - sum log(1 -
    a^2 + 1e-6) that of the squashed action a = tanh(u):

    - "gaussian", the authors' code since December 2024 (commit 32fc2bd): -p (A g) / (p + 1e-8). The
      factor cancels p, so that this is -A g all but exactly: it widens the Gaussian, and nothing
      keeps its mean from where all actions lie at their bounds.
    - "squashed", their code before, which made the published curves: -(A g - sum log(1 - a^2 +
      1e-6)) up to a constant. Actions at their bounds cost entropy.

    :param sample: of the policy prior
    :param entropy: one of :data:`tdmpc2_sb3.settings.ENTROPIES`
    """
    action_dim, gaussian = sample.action.shape[-1], sample.gaussian_log_prob
    if entropy == "squashed":
        return -(sample.log_prob + (action_dim - 1) * gaussian)
    # Both factors carry gradients.
    scale = gaussian * action_dim / (sample.log_prob + ENTROPY_EPSILON)
    return -sample.log_prob * scale


def policy_loss(
    model: WorldModel,
    latents: th.Tensor,
    scale: th.Tensor,
    noise: PolicyNoise,
    config: LossConfig,
    weights: th.Tensor,
    tau: float,
    alive: th.Tensor | None = None,
) -> PolicyLosses:
    """-(entropy_coef * scaled entropy + Q / S), weighted over the steps (TD-MPC2, eq. 4).

    Its gradients reach the policy alone.

    :param model: after the world model's optimiser step
    :param latents: z_0..z_T, detached, [T + 1, B, Z]
    :param scale: S before its update, []
    :param noise: of :func:`sample_update_noise`
    :param config: coefficients
    :param weights: of :func:`step_weights`, [T + 1]
    :param tau: rate at which S moves
    :param alive: of :func:`alive_states`, [T + 1, B]; None if all states count
    """
    sample = model.policy(latents, noise.action)
    logits = model.q_logits(latents, sample.action, noise.heads, noise.dropout, frozen=True)
    q = two_hot_inverse(logits, model.bins).mean(0)  # [T + 1, B]
    new_scale = updated_scale(scale, q[0].detach(), tau)
    entropy = scaled_entropy(sample, config.entropy)
    objective = config.entropy_coef * entropy + q / new_scale
    total = -(weights * _mean(objective, alive)).sum()
    return PolicyLosses(
        total,
        -sample.log_prob.detach().mean(),
        entropy.detach().mean(),
        new_scale,
    )
