"""Observations before VecNormalize, in the shape that the agent sees, and back.

The replay buffer holds observations as they were before VecNormalize, to be normalised by the
statistics of the day. Where layers lie above it (the zoo stacks frames there, SB3 transposes
images), what VecNormalize remembers is not yet what the agent sees; here the layers' work is done
on it too.

Shapes: E environments, ``...`` leading axes, n stacked frames.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, NoReturn

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecExtractDictObs, VecFrameStack, VecNormalize
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

ArrayOrDict = np.ndarray | dict[str, np.ndarray]
Arrays = dict[str, np.ndarray]

_SINGLE = ""  # the name of the only entry of a space that is no Dict


class _Entry(NamedTuple):
    """An entry of the agent's observations."""

    source: str  # the entry that VecNormalize has of it
    stack: StackedObservations | None = None  # the frames stacked above it


class NormalizationBelow:
    """A VecNormalize and the layers between it and the agent.

    :param env: outermost layer
    :param normalizer: among its layers
    :raises ValueError: if frames are stacked twice above it
    """

    def __init__(self, env: VecEnv, normalizer: VecNormalize):
        self.normalizer = normalizer
        self._known = False  # whether the layers above have been seen to do no more than is known
        self._above = []
        layer: Any = env
        while layer is not normalizer:
            self._above.append(layer)
            layer = layer.venv
        space = normalizer.observation_space
        names = list(space.spaces) if isinstance(space, spaces.Dict) else [_SINGLE]
        self._entries = {name: _Entry(name) for name in names}
        for layer in reversed(self._above):
            self._pass(layer)

    def _pass(self, layer: VecEnv) -> None:
        """Changes the entries as a layer does; most leave those that are normalised alone."""
        if isinstance(layer, VecExtractDictObs):
            self._entries = {_SINGLE: self._entries[layer.key]}
        elif isinstance(layer, VecFrameStack):
            for name, entry in self._entries.items():
                if entry.stack is not None:
                    raise ValueError(
                        "Two VecFrameStack lie above VecNormalize: stack once, or normalise last."
                    )
                stacked = layer.stacked_obs
                if name != _SINGLE or hasattr(stacked, "sub_stacked_observations"):
                    stacked = stacked.sub_stacked_observations[name]
                self._entries[name] = entry._replace(stack=stacked)

    def _statistics(self, entry: _Entry) -> RunningMeanStd | None:
        """Those that normalise an entry, None if it is left alone."""
        if not self.normalizer.norm_obs:
            return None
        found: Any = self.normalizer.obs_rms
        return found.get(entry.source) if isinstance(found, dict) else found

    # -- before VecNormalize -------------------------------------------------------------------

    def first(self, observation: ArrayOrDict) -> ArrayOrDict:
        """What the agent would see without normalisation after a reset.

        :param observation: what it sees, [E, ...]
        :raises RuntimeError: if a layer above VecNormalize changes observations in its own way; so
            does :meth:`next`
        """
        remembered = self._remembered(observation)
        originals = {**_parts(observation), **remembered}
        for name, entry in self._entries.items():
            if name in remembered and entry.stack is not None:
                originals[name] = _newest_alone(remembered[name], entry.stack)
        return _like(originals, observation)

    def _refuse(self) -> NoReturn:
        layers = ", ".join(type(layer).__name__ for layer in self._above)
        raise RuntimeError(
            f"Layers above VecNormalize ({layers}) change its observations in a way that is not "
            "known here: make VecNormalize the outermost."
        )

    def next(
        self, observation: ArrayOrDict, dones: np.ndarray, previous: ArrayOrDict
    ) -> ArrayOrDict:
        """The same after a step.

        :param observation: what the agent sees, [E, ...]
        :param dones: where it is a new episode's first, [E]
        :param previous: what this class returned after the step before
        """
        before, remembered = _parts(previous), self._remembered(observation)
        originals = {**_parts(observation), **remembered}
        for name, entry in self._entries.items():
            if name in remembered and entry.stack is not None:
                frame = remembered[name]
                going_on = _appended(before[name], frame, entry.stack)
                ended = np.reshape(dones, (-1, *[1] * (frame.ndim - 1)))
                originals[name] = np.where(ended, _newest_alone(frame, entry.stack), going_on)
        return _like(originals, observation)

    def _remembered(self, observation: ArrayOrDict) -> Arrays:
        """What VecNormalize remembers of the entries that it normalises, [E, ...].

        Until it has told them apart from nothing, what the agent sees is compared with it.
        """
        all_of_them = _parts(self.normalizer.get_original_obs())
        remembered = {
            name: all_of_them[entry.source]
            for name, entry in self._entries.items()
            if self._statistics(entry) is not None
        }
        if not self._known:
            self._compare(_parts(observation), remembered)
        return remembered

    def _compare(self, seen: Arrays, remembered: Arrays) -> None:
        if set(seen) != set(self._entries):
            self._refuse()
        telling = True
        for name, raw in remembered.items():
            entry = self._entries[name]
            statistics = self._statistics(entry)
            assert statistics is not None
            newest = seen[name] if entry.stack is None else _newest(seen[name], entry.stack)
            expected = self._scale(raw, statistics)
            if newest.shape != expected.shape or not np.allclose(newest, expected, atol=1e-4):
                self._refuse()
            telling &= bool(newest.any())
        self._known = telling

    def last(self, observation: ArrayOrDict, previous: ArrayOrDict, index: int) -> ArrayOrDict:
        """The same of one environment's last observation of an episode.

        :param observation: what the agent would have seen, [...]
        :param previous: what this class returned after the step before, [E, ...]
        :param index: of the environment
        """
        before, originals = _parts(previous), {}
        for name, values in _parts(observation).items():
            entry = self._entries[name]
            statistics = self._statistics(entry)
            if statistics is None:
                originals[name] = values
                continue
            newest = values if entry.stack is None else _newest(values[None], entry.stack)[0]
            deviation = np.sqrt(statistics.var + self.normalizer.epsilon)
            raw = newest * deviation + statistics.mean  # what was clipped stays so
            if entry.stack is not None:
                one = before[name][index : index + 1]
                raw = _appended(one, raw[None].astype(one.dtype), entry.stack)[0]
            originals[name] = raw
        return _like(originals, observation)

    # -- and back ------------------------------------------------------------------------------

    def with_last(
        self,
        observations: ArrayOrDict,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
        previous: ArrayOrDict,
    ) -> ArrayOrDict:
        """The observations that followed a step: an episode's last ones, where it ended, in place
        of the next one's first.

        :param observations: of :meth:`next`
        :param dones: whether the episodes ended, [E]
        :param infos: of the step
        :param previous: observations before the step
        """
        following = copy.deepcopy(observations)
        for index in np.flatnonzero(dones):
            last = infos[index].get("terminal_observation")
            if last is None:
                continue
            last = self.last(last, previous, int(index))
            if isinstance(following, dict):
                for key, values in following.items():
                    values[index] = last[key]
            else:
                following[index] = last
        return following

    def normalize(self, observations: ArrayOrDict, place: np.ndarray) -> ArrayOrDict:
        """What the agent sees.

        :param observations: without normalisation, [..., *shape]
        :param place: steps since each one's episode began, [...]: frames from before it are the
            zeros that VecFrameStack puts there after the normalisation
        """
        normalized = {}
        for name, values in _parts(observations).items():
            entry = self._entries[name]
            statistics = self._statistics(entry)
            if statistics is None:
                normalized[name] = values
            elif entry.stack is None:
                normalized[name] = self._scale(values, statistics)
            else:
                normalized[name] = self._normalize_frames(values, place, statistics, entry.stack)
        return _like(normalized, observations)

    def normalize_reward(self, rewards: np.ndarray) -> np.ndarray:
        """See VecNormalize."""
        return self.normalizer.normalize_reward(rewards)

    def _scale(self, values: np.ndarray, statistics: RunningMeanStd) -> np.ndarray:
        return self.normalizer._normalize_obs(values, statistics).astype(np.float32)

    def _normalize_frames(
        self,
        values: np.ndarray,
        place: np.ndarray,
        statistics: RunningMeanStd,
        stack: StackedObservations,
    ) -> np.ndarray:
        shape, frames = stack.observation_space.shape, stack.n_stack
        assert shape is not None
        batch = values.shape[: values.ndim - len(shape)]
        if stack.channels_first:
            each = values.reshape(*batch, frames, *shape)
        else:
            each = values.reshape(*batch, *shape[:-1], frames, shape[-1])
            each = np.moveaxis(each, -2, len(batch))  # [..., n, *shape]
        scaled = self._scale(each, statistics)
        ages = np.arange(frames - 1, -1, -1)  # oldest first
        is_zero = ~each.reshape(*batch, frames, -1).any(-1)
        scaled[is_zero & (ages > place[..., None])] = 0.0
        if not stack.channels_first:
            scaled = np.moveaxis(scaled, len(batch), -2)
        return scaled.reshape(values.shape)


def _parts(observation: Any) -> Arrays:
    return observation if isinstance(observation, dict) else {_SINGLE: observation}


def _like(parts: Arrays, observation: ArrayOrDict) -> ArrayOrDict:
    return parts if isinstance(observation, dict) else parts[_SINGLE]


def _newest(stacked: np.ndarray, stack: StackedObservations) -> np.ndarray:
    """The newest frames of stacks [E, ...]."""
    axis = stack.stack_dimension
    size = stacked.shape[axis] // stack.n_stack
    index = np.arange(stacked.shape[axis] - size, stacked.shape[axis])
    return stacked.take(index, axis=axis)


def _appended(stacked: np.ndarray, frame: np.ndarray, stack: StackedObservations) -> np.ndarray:
    """Stacks [E, ...] after one frame more each."""
    axis = stack.stack_dimension
    older = stacked.take(np.arange(frame.shape[axis], stacked.shape[axis]), axis=axis)
    return np.concatenate([older, frame], axis=axis)


def _newest_alone(frame: np.ndarray, stack: StackedObservations) -> np.ndarray:
    """The stacks [E, ...] of new episodes: zeros, and one frame."""
    axis = stack.stack_dimension
    older = [np.zeros_like(frame)] * (stack.n_stack - 1)
    return np.concatenate([*older, frame], axis=axis)
