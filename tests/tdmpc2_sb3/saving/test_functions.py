"""Which functions can be told to remember nothing from one call to the next."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from tdmpc2_sb3.saving.functions import remembers_nothing

SCALE = 0.5
COUNT = 0
MEMORY: list[float] = []
STREAM = np.random.default_rng(0)


def halved(reward):
    return SCALE * reward


def of_another(reward):
    return np.clip(halved(reward), -1.0, math.pi)


def recursive(depth):
    return depth if depth < 1 else recursive(depth - 1)


def counted(reward):
    global COUNT
    COUNT += 1
    return COUNT * reward


def summed(reward):
    MEMORY.append(reward)
    return sum(MEMORY)


def of_its_attribute(reward):
    of_its_attribute.calls = getattr(of_its_attribute, "calls", 0) + 1
    return of_its_attribute.calls * reward


def noisy(reward):
    return reward + np.random.normal()  # noqa: NPY002


def noisy_by_a_stream(reward):
    return reward + STREAM.normal()


def through_another(reward):
    return 2.0 * summed(reward)


def importing(reward):
    import random

    return reward * random.random()


def counting_within():
    calls = 0

    def counting(reward):
        nonlocal calls
        calls += 1
        return calls * reward

    return counting


def counting_further_within():
    calls = 0

    def counting(reward):
        def count():
            nonlocal calls
            calls += 1

        count()
        return calls * reward

    return counting


def scaled_by(scale):
    return lambda reward: scale * reward


def with_a_counter_of_its_own(rewards):
    calls = 0

    def count(reward):
        nonlocal calls
        calls += 1
        return calls * reward

    return [count(reward) for reward in rewards]


@pytest.mark.parametrize(
    "function",
    [
        *(halved, of_another, recursive, with_a_counter_of_its_own, scaled_by(0.5), abs, np.tanh),
        lambda reward: -reward,
        lambda observation: np.array([2 * each for each in observation], np.float32),
    ],
)
def test_functions_that_remember_nothing(function):
    assert remembers_nothing(function)


@pytest.mark.parametrize(
    "function",
    [
        *(counted, summed, of_its_attribute, noisy, noisy_by_a_stream, through_another, importing),
        *(counting_within(), counting_further_within(), scaled_by([0.5]), MEMORY.append),
        *(functools.partial(halved), np.vectorize(summed), lambda reward, memory=[]: memory),
    ],
)
def test_functions_that_may_remember_something(function):
    assert not remembers_nothing(function)
