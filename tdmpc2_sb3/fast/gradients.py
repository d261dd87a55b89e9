"""The losses of :mod:`tdmpc2_sb3.losses` with their gradients, by hand and by the CPU kernels.

For small networks autograd's graph, with a node for each small operation between the networks,
takes as long as the networks do. Here the chain rule is written out: each loss comes with its
gradient from one kernel, and each network takes it on in another. What has no kernels of its own,
an encoder of images or dynamics of other kinds, stays with autograd, one graph for the part alone.

Shapes: T training horizon, B batch, A action, Z latent, K bins, Q heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from torch import nn

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.fast.doorman import unknown_to_gradients
from tdmpc2_sb3.fast.network_gradients import (
    DirectNetwork,
    GradientArrays,
    are_trained,
    assign,
    parameter_gradients,
)
from tdmpc2_sb3.fast.state_space_gradients import StateSpaceRollout, with_inputs
from tdmpc2_sb3.kernels import Layer
from tdmpc2_sb3.losses import (
    LossConfig,
    ModelLosses,
    PolicyLosses,
    PolicyNoise,
    UpdateNoise,
    bootstrapped_steps,
    observations_at,
)
from tdmpc2_sb3.model.dynamics import LatentDynamics
from tdmpc2_sb3.model.dynamics.mlp import MLPDynamics
from tdmpc2_sb3.model.layers import MLP, QEnsemble
from tdmpc2_sb3.model.operations import total_norm
from tdmpc2_sb3.model.world_model import WorldModel
from tdmpc2_sb3.replay.buffer import SequenceBatch

#: Those of :data:`tdmpc2_sb3.losses.TERMS` that are known here.
TERMS = ("consistency", "reward", "value", "termination")


def _outputs(
    x: th.Tensor, layers: Sequence[Layer], members: tuple[int, ...] | None = None
) -> th.Tensor:
    """Of rows x, without gradients, [Q', B, out]."""
    return kernels.evaluation(x, layers, None, members).forward(keep=False)


class _Traced:
    """A part whose gradients autograd takes.

    :param module: whose parameters get them
    """

    def __init__(self, module: nn.Module):
        self._parameters = list(module.parameters())
        self._result: th.Tensor | None = None  # until its gradients are taken

    def evaluate(self, function: Callable[..., th.Tensor], *inputs: object) -> th.Tensor:
        """What the function makes of its inputs and the module, contiguous."""
        with th.enable_grad():
            self._result = function(*inputs)
        return self._result.detach().contiguous()

    def backward(self, grad: th.Tensor) -> GradientArrays:
        """Adds to the gradients of whatever the part was made from.

        :param grad: by the result
        """
        result, self._result = self._result, None
        assert result is not None, "evaluate first"
        if result.requires_grad:  # not if all that it was made from is frozen
            result.backward(grad)
        return [each.grad for each in self._parameters if each.grad is not None]


class _KernelRollout:
    """Latents that MLP dynamics predict.

    :param layers: of the dynamics
    """

    def __init__(self, layers: Sequence[Layer]):
        self._layers = kernels.KeptLayers(layers)
        self._room = kernels.GradientRoom(layers, 1, of_one=True)
        self._own = parameter_gradients(layers, self._room.gradients)
        self._is_whole = are_trained(self._own)
        self._rollout: kernels.Rollout | None = None  # until its gradients are taken

    def takes(self, latent: th.Tensor, actions: th.Tensor) -> bool:
        """Whether the kernels multiply matrices of these sizes here."""
        return kernels.usable_rollout(latent, actions, self._layers)

    def evaluate(self, latent: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param latent: z_0, [B, Z]
        :param actions: [T, B, A]
        :return: z_0..z_T, [1 + T, B, Z], and what z_1..z_T were predicted from, [T B, Z + A]
        """
        latents = latent.new_empty(1 + len(actions), *latent.shape)
        kernels.copy_(latent, latents[0])
        self._rollout = kernels.Rollout(latent, actions, self._layers)
        self._rollout.forward(True, latents[1:])
        return latents, self._rollout.inputs

    def backward(self, grad_latents: th.Tensor) -> tuple[th.Tensor, GradientArrays]:
        """Gives the parameters their gradients.

        :param grad_latents: gradients by z_0..z_T as far as they do not come from later latents,
            [1 + T, B, Z]; written to
        :return: by z_0 in full, [B, Z]; those of the parameters
        """
        rollout, self._rollout = self._rollout, None
        assert rollout is not None, "evaluate first"
        rollout.backward(grad_latents, self._room)
        written = assign(self._own)
        return grad_latents[0], [self._room.whole] if self._is_whole else written


class _TracedRollout:
    """The same for dynamics of any kind.

    :param dynamics: that predict
    """

    def __init__(self, dynamics: LatentDynamics):
        self._dynamics = dynamics
        self._traced = _Traced(dynamics)
        self._start: th.Tensor | None = None  # z_0 of the graph

    def evaluate(self, latent: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See :meth:`_KernelRollout.evaluate`."""
        self._start = latent.detach().requires_grad_()
        predicted = self._traced.evaluate(self._predict, self._start, actions)
        return with_inputs(latent, predicted, actions)

    def _predict(self, start: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self._dynamics.rollout(self._dynamics.initial_state(start), actions)

    def backward(self, grad_latents: th.Tensor) -> tuple[th.Tensor, GradientArrays]:
        """See :meth:`_KernelRollout.backward`."""
        written = self._traced.backward(grad_latents[1:])
        start, self._start = self._start, None
        assert start is not None
        assert start.grad is not None
        return grad_latents[0] + start.grad, written


class _KernelEncoder:
    """Latents of vectors.

    :param layers: of the encoder
    """

    def __init__(self, layers: Sequence[Layer]):
        self._network = DirectNetwork(layers)

    def evaluate(self, first: th.Tensor, following: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param first: rows, whose latents have gradients, [B, in]
        :param following: rows, whose latents have none, [T, B, in]
        :return: z_0, [B, Z], and the latents of the following, [T, B, Z]
        """
        encoded = _outputs(following, self._network.layers)
        latent = self._network.evaluate(first)[0]
        return latent, encoded.view(*following.shape[:-1], -1)

    def backward(self, grad_latent: th.Tensor) -> GradientArrays:
        """Gives the parameters their gradients.

        :param grad_latent: by z_0, [B, Z]
        """
        return self._network.backward(grad_latent.unsqueeze(0))


class StepGradients(NamedTuple):
    """The gradients of one loss, as a gradient step clips and applies them."""

    arrays: GradientArrays
    norm: th.Tensor  # of all, []

    @classmethod
    def of(cls, arrays: GradientArrays, like: th.Tensor) -> StepGradients:
        """Those in arrays that the kernels read, or others.

        :param like: of their device and type; there may be no arrays
        """
        if not arrays:
            return cls(arrays, like.new_zeros(()))
        return cls(arrays, total_norm(arrays))


class _ModelInputs(NamedTuple):
    """What the world model's losses are computed from."""

    first: th.Tensor  # observations, [B, in], where the kernels encode; else z_0, [B, Z]
    following: th.Tensor  # next observations, [T, B, in]; else their latents, [T, B, Z]
    actions: th.Tensor  # [T, B, A]
    rewards: th.Tensor  # [T, B]
    terminations: th.Tensor  # [T, B]
    valid: th.Tensor | None  # [T, B]
    next_action: th.Tensor  # standard normal, [T, B, A]
    target_heads: tuple[int, ...]  # two
    q_dropout: kernels.Dropped | None
    row_weights: th.Tensor  # what each row counts, [T, B]
    head_weights: th.Tensor  # the same of each Q head's
    bins: th.Tensor  # [K]


class _ModelResults(NamedTuple):
    losses: th.Tensor  # of TERMS, [4]
    latents: th.Tensor  # z_0..z_T, [T + 1, B, Z]
    grad_first: th.Tensor  # gradients by z_0, [B, Z]
    grad_following: th.Tensor | None  # by the next observations' latents, if they have any
    taken: StepGradients


def has_direct_gradients(model: WorldModel, config: LossConfig | None = None) -> bool:
    """Whether :class:`DirectGradients` knows every part and setting."""
    return not unknown_to_gradients(model, LossConfig() if config is None else config)


class DirectGradients:
    """Losses that come with their gradients, of a model that :func:`has_direct_gradients` takes.

    The parameters' gradients are views of arrays that the next losses write anew. Parameters that
    are frozen when this is made get none.

    :param model: whose parameters get them
    :param config: coefficients of the losses
    """

    def __init__(self, model: WorldModel, config: LossConfig):
        self._model = model
        self._config = config
        simplices = model.latent_simplices()

        def of_latents(network: MLP | QEnsemble) -> kernels.KeptLayers:
            layers = network.as_kernel()
            assert layers is not None, "ask has_direct_gradients first"
            return kernels.on_simplices(layers, simplices)

        self._reward = DirectNetwork(of_latents(model.reward_net))
        self._q = DirectNetwork(of_latents(model.q_ensemble), model.q_ensemble.num_q)
        self._target_q = of_latents(model.target_q_ensemble)
        self._policy = DirectNetwork(of_latents(model.policy_net))
        self._termination: DirectNetwork | None = None
        if model.termination_net is not None:
            self._termination = DirectNetwork(of_latents(model.termination_net))
        self._uniform: dict[tuple[th.Tensor, int, int], th.Tensor] = {}  # see _row_weights
        self._classifies_encoded = model.episodic and config.encoded_terminations
        self._encoder: _KernelEncoder | None = None
        # The latents of next observations have gradients too where the termination head learns
        # from them; autograd adds those up.
        encoder = model.encoder.as_kernel()
        if encoder is not None and not self._classifies_encoded:
            self._encoder = _KernelEncoder(encoder)
        self._first_encoder, self._next_encoder = _Traced(model.encoder), _Traced(model.encoder)
        self._rollout: _KernelRollout | None = None
        if isinstance(model.dynamics, MLPDynamics) and model.dynamics.as_kernel() is not None:
            self._rollout = _KernelRollout(of_latents(model.dynamics.net))
        self._traced_rollout = _TracedRollout(model.dynamics)
        self._state_space: StateSpaceRollout | None = None
        if StateSpaceRollout.takes(model.dynamics):
            self._state_space = StateSpaceRollout(model.dynamics, simplices)
        self._num_q = model.q_ensemble.num_q
        self._coefficients = th.tensor(
            [getattr(config, f"{name}_coef") for name in TERMS], dtype=th.float32
        )
        numbers = list(model.parameters())
        self._model_results = kernels.Captured(self._take_model_gradients, numbers)
        self._policy_results = kernels.Captured(self._take_policy_gradients, numbers)

    @th.no_grad()
    def model_losses(
        self, batch: SequenceBatch, noise: UpdateNoise, weights: th.Tensor
    ) -> tuple[ModelLosses, StepGradients]:
        """See :func:`tdmpc2_sb3.losses.model_losses`.

        :param batch: float32 sub-sequences on a CPU
        :param noise: of :func:`sample_update_noise`
        :param weights: of :func:`step_weights`, [T]
        :return: the losses, whose latents are good until the next ones; the gradients that the
            parameters have now
        """
        first, following = self._starts(batch, noise)
        num_rows = batch.rewards.shape[1]
        result = self._model_results(
            _ModelInputs(
                first,
                following,
                batch.actions,
                batch.rewards,
                batch.terminations,
                batch.valid,
                noise.next_action,
                tuple(noise.target_heads.tolist()),
                noise.q_dropout,
                self._row_weights(weights, num_rows, batch.valid),
                self._row_weights(weights, num_rows, batch.valid, self._num_q),
                self._model.bins,
            )
        )
        taken = result.taken
        if self._encoder is None:
            arrays = self._first_encoder.backward(result.grad_first)
            if result.grad_following is not None:  # one graph: adds to the gradients of the first
                arrays = self._next_encoder.backward(result.grad_following)
            taken = StepGradients.of([*taken.arrays, *arrays], result.losses)
        losses = result.losses.clone()
        terms = dict(zip(TERMS, losses, strict=True))
        if self._termination is None:
            del terms["termination"]
        return ModelLosses(losses @ self._coefficients, terms, result.latents), taken

    def _starts(self, batch: SequenceBatch, noise: UpdateNoise) -> tuple[th.Tensor, th.Tensor]:
        """What the kernels start from: rows of observations if they encode these, else z_0,
        [B, Z], and the latents of the next observations, [T, B, Z]."""
        model = self._model
        first = observations_at(batch.observations, 0)
        following = observations_at(batch.observations, slice(1, None))
        if self._encoder is not None:
            return model.observation_rows(first), model.observation_rows(following)
        latent = self._first_encoder.evaluate(model.encode, first, noise.first_offsets)
        if self._classifies_encoded:
            encode = self._next_encoder.evaluate
            return latent, encode(model.encode, following, noise.next_offsets)
        return latent, model.encode(following, noise.next_offsets).contiguous()

    def _take_model_gradients(self, inputs: _ModelInputs) -> _ModelResults:
        """Everything from the kernels' first one to their last."""
        config, rewards = self._config, inputs.rewards
        latent, next_latents = inputs.first, inputs.following
        if self._encoder is not None:
            latent, next_latents = self._encoder.evaluate(latent, next_latents)
        used = bootstrapped_steps(config)
        values = self._bootstrap(next_latents[used], inputs.next_action[used], inputs)
        targets = kernels.lambda_returns(
            values, rewards, inputs.terminations, config.gamma, config.td_lambda
        )

        rollout: _KernelRollout | _TracedRollout | StateSpaceRollout = self._traced_rollout
        if self._state_space is not None:
            rollout = self._state_space
        elif self._rollout is not None and self._rollout.takes(latent, inputs.actions):
            rollout = self._rollout
        latents, pairs = rollout.evaluate(latent, inputs.actions)  # z_0..z_T
        predicted = latents[1:]

        losses = latent.new_empty(len(TERMS))
        kernels.clear_(losses)
        consistency, reward, value, termination = losses
        grad_latents = th.empty_like(latents)  # z_0..z_T
        kernels.clear_(grad_latents[0])
        grad_states = grad_latents[:-1].view(-1, latent.shape[-1])  # z_0..z_{T-1} [T B, Z]
        kernels.squared_loss(
            predicted,
            next_latents,
            inputs.row_weights,
            config.consistency_coef,
            consistency,
            grad_latents[1:],
        )

        bins = inputs.bins
        logits = self._reward.evaluate(pairs)  # [1, T B, K]
        grad_logits = kernels.two_hot_loss(
            logits, rewards, inputs.row_weights, bins, config.reward_coef, reward
        )
        written = self._reward.backward(grad_logits, grad_states)

        logits = self._q.evaluate(pairs, inputs.q_dropout)  # [Q, T B, K]
        grad_logits = kernels.two_hot_loss(
            logits, targets, inputs.head_weights, bins, config.value_coef, value
        )
        written += self._q.backward(grad_logits, grad_states)

        grad_next: th.Tensor | None = None
        if self._termination is not None:
            grad_next, of_termination = self._termination_loss(
                self._termination, inputs, predicted, next_latents, termination, grad_latents
            )
            written += of_termination

        grad_latent, of_dynamics = rollout.backward(grad_latents)
        written += of_dynamics
        if self._encoder is not None:
            written += self._encoder.backward(grad_latent)
        return _ModelResults(
            losses, latents, grad_latent, grad_next, StepGradients.of(written, losses)
        )

    def _bootstrap(self, latents: th.Tensor, noise: th.Tensor, inputs: _ModelInputs) -> th.Tensor:
        """The lesser of two target Q heads at the latents and actions of the policy prior.

        :param latents: [..., B, Z]
        :param noise: standard normal, [..., B, A]
        :param inputs: of the losses
        :return: [..., B]
        """
        draw = self._draw(latents, noise, _outputs(latents, self._policy.layers)[0])
        logits = _outputs(draw.pairs, self._target_q, inputs.target_heads)
        values = kernels.least(kernels.two_hot_inverse(logits, inputs.bins))
        return values.view(latents.shape[:-1])

    def _draw(self, latents: th.Tensor, noise: th.Tensor, moments: th.Tensor) -> kernels.PolicyDraw:
        """The policy prior's draw.

        :param latents: [..., Z]
        :param noise: standard normal, [..., A]
        :param moments: the policy network's outputs, [B, 2 A]
        """
        noise, latents = (each.reshape(-1, each.shape[-1]) for each in (noise, latents))
        squashed = self._config.entropy == "squashed"
        return kernels.PolicyDraw(moments, noise, latents, squashed)

    def _termination_loss(
        self,
        head: DirectNetwork,
        inputs: _ModelInputs,
        predicted: th.Tensor,
        encoded: th.Tensor,
        loss: th.Tensor,
        grad_latents: th.Tensor,
    ) -> tuple[th.Tensor | None, GradientArrays]:
        """Cross-entropy of the termination head on z_1..z_T and, if it learns from those, on the
        encoded next observations.

        :param head: that classifies
        :param inputs: of the losses
        :param predicted: z_1..z_T, [T, B, Z]
        :param encoded: the same shape
        :param loss: written to, []
        :param grad_latents: gradients by z_0..z_T, added to, [1 + T, B, Z]
        :return: gradients by ``encoded`` if the head learns from it; those of the head
        """
        classified = [predicted, encoded] if self._classifies_encoded else [predicted]
        rows, grad_rows = predicted.new_empty(2, len(classified), *predicted.shape)
        for latents, row in zip(classified, rows, strict=True):
            kernels.copy_(latents, row)
        kernels.clear_(grad_rows)
        kernels.copy_(grad_latents[1:], grad_rows[0])
        flat, grad_flat = (each.view(-1, predicted.shape[-1]) for each in (rows, grad_rows))
        grad_logits = kernels.termination_loss(
            head.evaluate(flat),
            inputs.terminations,
            inputs.valid,
            self._config.termination_coef,
            loss,
        )
        written = head.backward(grad_logits, grad_flat)
        kernels.copy_(grad_rows[0], grad_latents[1:])
        return grad_rows[1] if self._classifies_encoded else None, written

    @th.no_grad()
    def policy_loss(
        self,
        latents: th.Tensor,
        scale: th.Tensor,
        noise: PolicyNoise,
        weights: th.Tensor,
        tau: float,
        alive: th.Tensor | None = None,
    ) -> tuple[PolicyLosses, StepGradients]:
        """See :func:`tdmpc2_sb3.losses.policy_loss`.

        :param latents: z_0..z_T, [T + 1, B, Z]
        :param scale: S before its update, []
        :param noise: of :func:`sample_update_noise`
        :param weights: of :func:`step_weights`, [T + 1]
        :param tau: rate at which S moves
        :param alive: of :func:`alive_states`, [T + 1, B]; None if all states count
        :return: the loss; the gradients that the policy's parameters have now
        """
        row_weights = self._row_weights(weights, latents.shape[1], alive)
        heads = tuple(noise.heads.tolist())
        losses, taken = self._policy_results(
            latents, scale, noise.action, heads, noise.dropout, row_weights, tau, self._model.bins
        )
        return PolicyLosses(*(each.clone() for each in losses)), taken

    def _take_policy_gradients(
        self,
        latents: th.Tensor,
        scale: th.Tensor,
        noise: th.Tensor,
        heads: tuple[int, ...],
        dropped: kernels.Dropped | None,
        row_weights: th.Tensor,
        tau: float,
        bins: th.Tensor,
    ) -> tuple[PolicyLosses, StepGradients]:
        draw = self._draw(latents, noise, self._policy.evaluate(latents)[0])
        q_networks = kernels.evaluation(draw.pairs, self._q.layers, dropped, heads)
        logits = q_networks.forward(keep=True)  # [2, (T + 1) B, K]
        objective = kernels.policy_objective(
            kernels.two_hot_inverse(logits, bins),
            draw,
            row_weights.view(-1),
            scale,
            tau,
            self._config.entropy_coef,
            latents.shape[1],
        )
        grad_logits = kernels.two_hot_inverse_backward(objective.grad_values, logits, bins)
        grad_actions, _ = q_networks.backward(grad_logits, slice(latents.shape[-1], None), False)
        assert grad_actions is not None
        grad_moments = draw.backward(grad_actions, objective.grad_entropy)
        written = self._policy.backward(grad_moments.unsqueeze(0))
        return PolicyLosses(*objective[:4]), StepGradients.of(written, latents)

    def _row_weights(
        self, weights: th.Tensor, num_rows: int, counted: th.Tensor | None, num_heads: int = 1
    ) -> th.Tensor:
        """What each row counts in a loss that averages over the batch and the heads, [steps, B].

        :param weights: of the steps, [steps]; the same object in each gradient step
        :param num_rows: B
        :param counted: 1 where a row counts, else 0, [steps, B]; None if all do
        :param num_heads: that each have a loss of the row
        """
        key = (weights, num_rows, num_heads)
        if key not in self._uniform:
            uniform = (weights / (num_heads * num_rows)).unsqueeze(1)
            self._uniform[key] = uniform.expand(-1, num_rows).contiguous()
        uniform = self._uniform[key]
        return uniform if counted is None else uniform * counted
