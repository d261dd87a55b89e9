"""What the kernels are given is checked where it enters: they read nothing else than is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.fast.plans import DirectPlanning
from tdmpc2_sb3.kernels import AdamArrays, Layer, library
from tdmpc2_sb3.kernels.library import call
from tdmpc2_sb3.kernels.products import MIN_ROWS, usable_product
from tdmpc2_sb3.model.world_model import Architecture, WorldModel
from tdmpc2_sb3.planner import PlannerConfig, sample_plan_noise

CONFIG = PlannerConfig(3, 16, 4, 4, 2)


@pytest.fixture(autouse=True)
def _kernels_multiply():
    if library() is None or not usable_product(MIN_ROWS, 16):
        pytest.skip("no products by kernels here")


@pytest.mark.parametrize("dtype", [th.float64, th.bfloat16, th.int32])
def test_other_types_are_refused(dtype):
    with pytest.raises(RuntimeError, match=f"Array 1 of add_rows is {dtype} on cpu"):
        kernels.add(th.ones(2, 3), th.ones(3, dtype=dtype))
    with pytest.raises(RuntimeError, match=r"read torch\.float32 on a CPU"):
        call("clear_array", th.ones(3, dtype=dtype), 3)


def test_scattered_numbers_are_refused():
    with pytest.raises(RuntimeError, match=r"strides \(1, 2\)"):
        kernels.add(th.ones(3, 2).t(), th.ones(3))


def test_layers_that_do_not_fit_are_refused():
    x = th.ones(9, 4)
    with pytest.raises(RuntimeError, match=r"bias of layer 0 has shape \(6,\), but \(5,\)"):
        kernels.networks(x, None, [Layer(th.ones(5, 4), th.ones(6))])
    with pytest.raises(RuntimeError, match="layers do not fit each other"):
        kernels.networks(x, None, [Layer(th.ones(5, 4), None), Layer(th.ones(2, 6), None)])
    with pytest.raises(RuntimeError, match="4 columns for networks that read 3"):
        kernels.networks(x, None, [Layer(th.ones(5, 3), None)])


def test_layers_of_another_type_go_by_torch():
    weight = th.ones(5, 4, dtype=th.float64)
    result = kernels.networks(th.ones(9, 4, dtype=th.float64), None, [Layer(weight, None)])
    assert result.tolist() == [[4.0] * 5] * 9


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_moments_of_another_shape_are_refused(wrong):
    arrays = [th.zeros(4, 3) for _ in range(4)]
    arrays[wrong] = th.zeros(1)
    with pytest.raises(RuntimeError, match=r"has shape \(1,\), but \(4, 3\) is needed"):
        AdamArrays([(*arrays, th.zeros(()))])
    with pytest.raises(RuntimeError, match="count of steps"):
        AdamArrays([(*[th.zeros(4, 3)] * 4, th.zeros(0))])


@pytest.fixture
def inputs(roughen):
    """Planning, and what one plan takes."""
    th.manual_seed(0)
    space = spaces.Box(-np.inf, np.inf, (5,), np.float32)
    model = WorldModel(space, 2, Architecture(16, 12, 14, 2, 4))
    roughen(model)
    noise = sample_plan_noise(model, CONFIG, 1, th.Generator().manual_seed(0))
    return DirectPlanning(model), th.ones(1, 5), noise


@pytest.mark.parametrize("shape", [(1, 5, 2), (1, 1, 2), (1, 3, 1), (1, 3, 7), (2, 3, 2)])
@pytest.mark.parametrize("is_captured", [False, True])
def test_a_previous_plan_of_another_shape_is_refused(inputs, shape, is_captured):
    direct, observation, noise = inputs
    if is_captured:  # that of the right shape
        direct.plan(observation, th.zeros(1, 3, 2), noise, CONFIG, True)
    with pytest.raises(RuntimeError, match="The plan that is gone on with has shape"):
        direct.plan(observation, th.zeros(shape), noise, CONFIG, True)


@pytest.mark.parametrize(
    "name", ["policy", "samples", "terminal", "heads", "gumbel", "exploration"]
)
def test_noise_of_another_shape_is_refused(inputs, name):
    direct, observation, noise = inputs
    less = getattr(noise, name)[..., :-1]
    with pytest.raises(RuntimeError, match=r"has shape .* is needed"):
        direct.plan(observation, th.zeros(1, 3, 2), noise._replace(**{name: less}), CONFIG, True)
