"""The file of an agent: all that it is and where it was, but for its replay buffer."""

from __future__ import annotations

import io
import pathlib
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces

from tdmpc2_sb3.policies import TDMPC2Policy
from tdmpc2_sb3.saving import action_noise as noises
from tdmpc2_sb3.saving import episode_state, interrupts
from tdmpc2_sb3.saving.archive import write_archive
from tdmpc2_sb3.saving.attribute_checks import check_attributes, check_parts
from tdmpc2_sb3.saving.parameter_checks import check_parameters, check_streams
from tdmpc2_sb3.saving.schedules import for_writing
from tdmpc2_sb3.settings import SETTINGS

if TYPE_CHECKING:
    from tdmpc2_sb3.tdmpc2 import TDMPC2

Agent = TypeVar("Agent", bound="TDMPC2")

_TARGETS = "world_model.target_q_ensemble."


def save(
    agent: TDMPC2,
    path: str | pathlib.Path | io.BufferedIOBase,
    exclude: Iterable[str],
    include: Iterable[str],
    resumable: bool,
) -> None:
    """See :meth:`tdmpc2_sb3.TDMPC2.save`."""
    excluded = {*agent._excluded_save_params(), *exclude} - set(include)
    data = {name: value for name, value in agent.__dict__.items() if name not in excluded}
    for name in ("learning_rate", "lr_schedule"):
        if name in data:
            data[name] = for_writing(data[name], name)
    parameters = agent.get_parameters()
    if resumable:
        data["run_state"] = run_state(agent)
        parameters["run_streams"] = run_streams(agent)
    else:
        data["resumable"] = False
        weights = {k: v for k, v in parameters["policy"].items() if not k.startswith(_TARGETS)}
        parameters = {"policy": weights}
    write_archive(path, data, parameters)


def run_state(agent: TDMPC2) -> dict[str, Any]:
    """Where a run is, besides its random streams: the episodes, and what is frozen."""
    episodes = agent._saved_episodes
    known = agent._last_obs is not None and not interrupts.broken_off()
    if episodes is None and agent.env is not None and known:
        episodes = episode_state.capture(agent.env)
    return {
        "episodes": episodes,
        "action_space_stream": agent.action_space.np_random.bit_generator.state,
        "noise_stream": None if agent.action_noise is None else noises.stream(),
        "frozen": [name for name, each in _trainable(agent).items() if not each.requires_grad],
    }


def _trainable(agent: TDMPC2) -> dict[str, th.nn.Parameter]:
    """Parameters that gradient steps change, by name, unless they are frozen."""
    return {
        name: each
        for name, each in unwrapped(agent.policy).named_parameters()
        if not name.startswith(_TARGETS)
    }


def run_streams(agent: TDMPC2) -> dict[str, th.Tensor]:
    """The random streams, and the plan that the next one starts from."""
    streams = {
        "training": agent._training_generator.get_state(),
        "predictions": agent.policy.generator.get_state(),
    }
    if agent._plan_mean is not None:
        streams["plan_mean"] = agent._plan_mean.cpu()
    if agent._pink_noise is not None:
        streams["pink_noise"] = agent._pink_noise.state.cpu()
    return streams


def load(
    cls: type[Agent],
    path: str | pathlib.Path | io.BufferedIOBase,
    read: tuple[dict[str, Any], dict[str, Any]],
    env: GymEnv | None,
    device: th.device,
    custom_objects: dict[str, Any],
    force_reset: bool,
    kwargs: dict[str, Any],
) -> Agent:
    """See :meth:`tdmpc2_sb3.TDMPC2.load`.

    :param cls: of the agent
    :param read: what the file holds
    """
    data, tensors = read
    resumable = data.pop("resumable", True) is not False
    check_parts(path, data, tensors, resumable)
    data.setdefault("entropy", "gaussian")  # files older than the argument
    state, streams = data.pop("run_state", {}), tensors.pop("run_streams", {})
    if not resumable:
        tensors = {"policy": _with_targets(tensors["policy"])}
    _check_replaced(kwargs, data)
    saved = {name: value for name, value in data.items() if name not in custom_objects}
    # Where a file says is no place to write: whoever loads it names the folder.
    data["tensorboard_log"] = custom_objects.get("tensorboard_log")
    same_envs = False
    if env is not None:
        env = cls._wrap_env(env, data.get("verbose", 0))
        try:
            check_for_correct_spaces(env, data["observation_space"], data["action_space"])
        except ValueError as error:  # its arrays have several lines
            raise ValueError(" ".join(str(error).split())) from error
        same_envs = env.num_envs == data["n_envs"]
        data["n_envs"] = env.num_envs
    agent = cls(data["policy_class"], env, device=device, _init_setup_model=False)
    check_attributes(saved, agent)
    agent.__dict__.update(data)
    agent.__dict__.update(kwargs)
    if env is not None and saved.get("tensorboard_log") and agent.tensorboard_log is None:
        _say_log_is_left("tensorboard_log" in kwargs, saved["tensorboard_log"])
    _set_up(agent, tensors["policy"])
    check_parameters(agent, "policy", tensors["policy"], whole=True)
    enc_lr_scale = agent.policy.enc_lr_scale
    agent.set_parameters(tensors, exact_match=resumable, device=device)
    if not resumable:
        _begin_anew(agent)
        return agent
    agent.policy.set_enc_lr_scale(enc_lr_scale)  # the optimiser has that of the file
    check_streams(agent, streams, state, int(saved.get("n_envs", agent.n_envs)))
    if "frozen" in state:
        for name, parameter in _trainable(agent).items():
            parameter.requires_grad_(name not in state["frozen"])
    if kwargs.get("seed", agent.seed) == data.get("seed"):
        restore_streams(agent, streams, state)
    _restore_run(agent, streams, state, same_envs, force_reset)
    return agent


def _with_targets(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights of a file without target networks, with those of the Q networks in their place."""
    own = "world_model.q_ensemble."
    targets = {_TARGETS + k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}
    return {**weights, **targets}


def _begin_anew(agent: TDMPC2) -> None:
    """Of a file that holds no run: the next learn() starts its environments and optimisers."""
    agent._last_obs = agent._last_original_obs = None
    agent._without_run = True


def _check_replaced(kwargs: dict[str, Any], data: dict[str, Any]) -> None:
    """
    :param kwargs: attributes that are to replace those of the file
    :param data: of the file
    :raises ValueError: naming one that cannot
    """
    if "policy_kwargs" in kwargs and kwargs["policy_kwargs"] != data["policy_kwargs"]:
        raise ValueError(
            f"policy_kwargs are {kwargs['policy_kwargs']} but the model was saved with "
            f"{data['policy_kwargs']}: leave them out."
        )
    unknown = kwargs.keys() - data.keys() - SETTINGS.keys()
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: the model has no such attribute to replace; check "
            "the spelling."
        )


def _say_log_is_left(chosen: bool, folder: Any) -> None:
    if not chosen:
        warnings.warn(
            f"The model was saved with tensorboard_log={folder!r}, where nothing is written "
            "unless you say so: pass tensorboard_log to load() to go on with a log.",
            stacklevel=4,
        )


def _set_up(agent: TDMPC2, weights: dict[str, Any]) -> None:
    """Builds an agent by the settings of a file, whose sizes must be its weights'.

    :param weights: the policy's state dict
    :raises ValueError: if the settings do not fit together, or not the weights
    """
    arguments = {name: getattr(agent, name) for name in agent.POLICY_ARGUMENTS}
    try:
        if issubclass(agent.policy_class, TDMPC2Policy):
            agent.policy_class.check_weights(
                agent.observation_space,
                agent.action_space,
                {**arguments, **agent.policy_kwargs},
                weights,
            )
        agent._setup_model()
    except ValueError:
        raise
    except Exception as error:  # whatever wrong settings lead to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"The saved settings do not fit together ({reason[:200]}): use another copy or an "
            "earlier checkpoint."
        ) from error


def restore_streams(agent: TDMPC2, streams: dict[str, th.Tensor], state: dict[str, Any]) -> None:
    """Goes on with the random streams of a file.

    :param streams: of :func:`run_streams`
    :param state: of :func:`run_state`
    """
    generators = {"training": agent._training_generator, "predictions": agent.policy.generator}
    for name, generator in generators.items():
        numbers = streams[name].cpu()
        if numbers.shape == generator.get_state().shape:
            generator.set_state(numbers)
        elif agent.verbose >= 1:
            print(
                f"The random stream of {name} was that of another kind of device than "
                f"{agent.device}: it begins anew from the seed."
            )
    agent.action_space.np_random.bit_generator.state = state["action_space_stream"]
    pink, saved = agent._pink_noise, streams.get("pink_noise")
    if pink is not None and saved is not None and saved.shape == pink.state.shape:
        pink.state = saved.to(pink.state.device)
    if state.get("noise_stream") is not None:
        noises.restore_stream(state["noise_stream"])


def _restore_run(
    agent: TDMPC2,
    streams: dict[str, th.Tensor],
    state: dict[str, Any],
    same_envs: bool,
    force_reset: bool,
) -> None:
    """Keeps the episodes in progress for learn() if they can be restored or still run."""
    noise = agent.action_noise
    if isinstance(noise, VectorizedActionNoise) and noise.n_envs != agent.n_envs:
        base = noise.base_noise
        several = agent.n_envs > 1
        agent.action_noise = VectorizedActionNoise(base, agent.n_envs) if several else base
    episodes = state["episodes"]
    if same_envs and agent.env is not None:
        agent._why_anew = _find_obstacle(agent, episodes)
    restorable = same_envs and episodes is not None and agent._why_anew is None
    if restorable or (same_envs and not force_reset):
        agent._saved_episodes = episodes if restorable else None
        if "plan_mean" in streams:
            agent._plan_mean = streams["plan_mean"].to(agent.device)
    else:
        agent._last_obs = None
        agent._last_original_obs = None


def _find_obstacle(agent: TDMPC2, episodes: episode_state.EpisodeStates | None) -> str | None:
    """What keeps the saved episodes from going on. Where the environments themselves could,
    it comes as a surprise, and is a warning."""
    assert agent.env is not None
    found = episode_state.obstacle(agent.env, episodes)
    if found is not None and episode_state.has_state(agent.env):
        warnings.warn(
            f"The episode in progress does not go on where it was, but ends as truncated: {found}.",
            stacklevel=5,
        )
    return found


def unwrapped(policy: Any) -> Any:
    """The policy itself, of which ``torch.compile`` makes a wrapper."""
    return getattr(policy, "_orig_mod", policy)
