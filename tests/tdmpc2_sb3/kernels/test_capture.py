"""Captures: what is replayed, on which numbers, and when a function is captured anew or not."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch as th

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.kernels import Captured, Layer, capture, library
from tdmpc2_sb3.kernels.library import call
from tdmpc2_sb3.kernels.products import operation_counter


@pytest.fixture(autouse=True)
def _kernels_are_built():
    if library() is None:
        pytest.skip("no C compiler here: nothing is captured")
    th.manual_seed(0)


class Sums:
    """Adds a parameter to rows, by the kernels."""

    def __init__(self, width=4):
        self.bias = th.arange(width, dtype=th.float32)
        self.calls = 0
        self.captured = Captured(self.add, [self.bias])

    def add(self, rows, times):
        self.calls += 1
        for _ in range(times):
            rows = kernels.add(rows, self.bias)
        return rows


def test_replays_read_new_numbers_and_parameters():
    sums = Sums()
    for turn in range(4):
        rows = th.randn(3, 4)
        sums.bias += turn
        assert th.equal(sums.captured(rows, 2), rows + sums.bias + sums.bias)
    assert (sums.calls, sums.captured.replays) == (1, 3)


def test_arguments_are_left_alone():
    sums, rows = Sums(), th.ones(3, 4)
    for _ in range(2):
        sums.captured(rows, 1)
        assert th.equal(rows, th.ones(3, 4))


def test_a_capture_is_for_sizes_values_and_threads():
    sums, before = Sums(), th.get_num_threads()
    rows = th.randn(3, 4)
    for other in (th.randn(5, 4), th.randn(1, 3, 4)):
        assert th.equal(sums.captured(other, 1), other + sums.bias)
    assert th.equal(sums.captured(rows, 1), rows + sums.bias)
    assert th.equal(sums.captured(rows, 3), rows + sums.bias + sums.bias + sums.bias)
    try:
        th.set_num_threads(before + 1)
        sums.captured(rows, 1)
    finally:
        th.set_num_threads(before)
    of_thread = threading.Thread(target=sums.captured, args=(rows, 1))
    of_thread.start()
    of_thread.join()
    assert (sums.calls, sums.captured.replays) == (6, 0)
    sums.captured(rows, 1)
    assert sums.captured.replays == 1


def in_a_thread(action):
    """What the action returns, in a thread that has ended afterwards."""
    results = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    thread.join()
    return results[0]


def test_captures_end_with_their_thread():
    """A later thread may have the identity of an ended one, whose memory is someone else's."""
    sums, rows = Sums(1000), th.randn(40, 1000)
    wanted = rows + sums.bias + sums.bias + sums.bias
    identities, memories, others = set(), [], []

    def run():
        identities.add(threading.get_ident())
        memories.append(weakref.ref(capture._thread.memory))
        results = [sums.captured(rows, 3).clone() for _ in range(3)]
        assert sums.captured.replays == 2
        return results

    for turn in range(8):
        for result in in_a_thread(run):
            assert th.equal(result, wanted)
        others.append(th.full((40, 1000), float(turn)))  # where the thread's arrays may have been
    assert len(identities) < 8, "no identity came back here: nothing was shown"
    assert sums.calls == 8
    for turn, other in enumerate(others):
        assert th.equal(other, th.full((40, 1000), float(turn)))
    gc.collect()
    assert [each() for each in memories] == [None] * 8


def test_results_outlive_their_thread():
    sums, rows = Sums(1000), th.randn(40, 1000)
    result = in_a_thread(lambda: sums.captured(rows, 3))
    gc.collect()
    others = [in_a_thread(lambda: sums.captured(rows + 1, 3)) for _ in range(4)]
    assert th.equal(result, rows + sums.bias + sums.bias + sums.bias)
    for other in others:
        assert th.equal(other, rows + 1 + sums.bias + sums.bias + sums.bias)


def test_threads_at_the_same_time():
    """Each captures by itself, whatever the others do meanwhile."""
    sums = Sums(1000)
    rows = [th.randn(40, 1000) for _ in range(6)]

    def run(x):
        return [sums.captured(x, 3).clone() for _ in range(50)]

    with ThreadPoolExecutor(6) as pool:
        for x, results in zip(rows, pool.map(run, rows), strict=True):
            wanted = x + sums.bias + sums.bias + sums.bias
            assert all(th.equal(result, wanted) for result in results)


def test_inputs_that_lie_apart_or_are_one_number():
    sums = Sums()
    for turn in range(3):
        rows = (th.randn(4, 3) + turn).t() if turn else th.ones(1, 1).expand(3, 4)
        assert th.equal(sums.captured(rows, 1), rows + sums.bias)
    assert sums.captured.replays == 2


def test_parameters_that_moved():
    sums, rows = Sums(), th.randn(3, 4)
    sums.captured(rows, 1)
    sums.captured(rows, 1)
    sums.bias.data = sums.bias + 10.0
    assert th.equal(sums.captured(rows, 1), rows + sums.bias)
    assert sums.calls == 2
    assert th.equal(sums.captured(rows, 1), rows + sums.bias)
    assert (sums.calls, sums.captured.replays) == (2, 1)


def test_what_torch_computes_in_is_called():
    calls = []

    def double(rows):
        calls.append(rows)
        return kernels.add(rows, rows) + 1.0

    captured = Captured(double, [])
    for turn in range(5):
        rows = th.full((2, 3), float(turn))
        assert th.equal(captured(rows), 2 * rows + 1)
    assert len(calls) == 5
    assert captured.replays == 0
    assert captured.computed_by_torch == ["aten.add.Tensor"]


def test_what_is_made_once_may_be_made_by_torch():
    kept = {}

    def shifted(rows):
        if "shift" not in kept:
            kept["shift"] = th.ones(3) * 5
        return kernels.add(rows, kept["shift"])

    captured = Captured(shifted, [])
    for _ in range(4):
        rows = th.randn(2, 3)
        assert th.equal(captured(rows), rows + 5)
    assert captured.replays == 2


def test_operations_are_counted_by_torch():
    layer = Layer(th.randn(16, 16), None)
    captured = Captured(lambda x: kernels.evaluation(x, [layer]).forward(keep=False), [])
    x = th.randn(8, 16)
    captured(x)
    with operation_counter() as counter:
        counted = captured(x)
    assert counter.get_total_flops() == 2 * 8 * 16 * 16
    th.testing.assert_close(counted[0], x @ layer.weight.t())


def test_actions_are_repeated_in_their_place():
    seen = []
    total = th.zeros(3)

    def run(rows):
        kernels.copy_(kernels.add(rows, rows), total)
        kernels.with_calls(lambda: seen.append(total.tolist()))
        kernels.clear_(total)

    captured = Captured(run, [])
    for turn in range(3):
        captured(th.full((3,), float(turn)))
    assert seen == [[2.0 * turn] * 3 for turn in range(3)]
    assert total.tolist() == [0.0] * 3


def test_results_of_other_captures_are_not_written_to():
    """Arrays on the way share their memory, results have theirs."""
    functions = [Sums(1000) for _ in range(5)]
    rows = [th.randn(40, 1000) for _ in functions]
    results = [each.captured(x, 6) for each, x in zip(functions, rows, strict=True)]
    for _ in range(2):
        for each, x, result in zip(functions, rows, results, strict=True):
            each.captured(x, 6)
            wanted = x
            for _ in range(6):
                wanted = wanted + each.bias
            assert th.equal(result, wanted)
    addresses = {each.data_ptr() for each in results}
    assert len(addresses) == len(results)


def test_memory_is_taken_again():
    memory = capture._Memory()
    like = th.empty(1000)
    first, second = memory.like(like), memory.like(like)
    assert first.data_ptr() != second.data_ptr()
    place, part = first.data_ptr(), first[10:]
    del first
    third = memory.like(like)
    assert third.data_ptr() not in (place, second.data_ptr())  # part is still in there
    del part
    small = [memory.like(th.empty(10)) for _ in range(3)]
    assert {place <= each.data_ptr() < place + 4000 for each in small} == {True}
    ranges = sorted((each.data_ptr(), each.numel() * 4) for each in (second, third, *small))
    for (begin, size), (after, _) in itertools.pairwise(ranges):
        assert begin + size <= after
    large = memory.like(th.empty(capture.CHUNK // 4))
    assert large.numel() == capture.CHUNK // 4
    large.fill_(1.0)
    assert memory.like(th.empty(0, 3)).shape == (0, 3)
    assert memory.like(th.empty(3, dtype=th.int64)).dtype is th.int64


def test_a_copy_captures_by_itself():
    sums, rows = Sums(), th.randn(3, 4)
    sums.captured(rows, 1)
    copied = copy.deepcopy(sums)
    copied.bias += 1.0
    assert th.equal(copied.captured(rows, 1), rows + copied.bias)
    assert th.equal(copied.captured(rows, 1), rows + copied.bias)
    assert th.equal(sums.captured(rows, 1), rows + sums.bias)
    assert (sums.calls, copied.calls) == (1, 2)


def test_an_error_leaves_nothing_behind():
    sums = Sums()

    def fail(rows):
        kernels.add(rows, rows)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        Captured(fail, [])(th.ones(2, 3))
    total = th.zeros(3)
    call("clear_array", total, 3)  # not written down anywhere
    rows = th.randn(3, 4)
    for _ in range(2):
        assert th.equal(sums.captured(rows, 1), rows + sums.bias)


def assert_same_parameters(one, other):
    for ours, theirs in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)


@pytest.mark.parametrize("policy", ["MlpPolicy", "SSMPolicy"])
def test_learning_goes_on_in_other_threads(make_agent, policy):
    """As a server or a notebook does: a thread for every few steps, bit for bit as in one."""
    pieces = [23, *[3] * 12]
    wanted = make_agent(policy=policy, initial_gradient_steps=2)
    threaded = make_agent(policy=policy, initial_gradient_steps=2)
    identities = set()

    def learn(steps):
        identities.add(threading.get_ident())
        return threaded.learn(steps, reset_num_timesteps=False)

    for steps in pieces:
        wanted.learn(steps, reset_num_timesteps=False)
        in_a_thread(lambda steps=steps: learn(steps))
        th.randn(64, 1024)  # takes memory that the thread had
    assert len(identities) < len(pieces), "no identity came back here: nothing was shown"
    assert_same_parameters(threaded, wanted)


def test_threads_predict_at_the_same_time(make_agent):
    model = make_agent()
    observations = th.randn(6, 3).numpy()
    wanted = [model.predict(each, deterministic=True)[0].tolist() for each in observations]

    def run(observation):
        return [model.predict(observation, deterministic=True)[0].tolist() for _ in range(30)]

    with ThreadPoolExecutor(6) as pool:
        for action, actions in zip(wanted, pool.map(run, observations), strict=True):
            assert actions == [action] * 30


# -- what torch does in operations of its own ---------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 70), (1, 1), (40, 1000)])
def test_rows_are_added_and_copied(shape, threads):
    a, b = th.randn(shape), th.randn(shape)
    assert th.equal(kernels.add(a, b), a + b)
    assert th.equal(kernels.add(a, b[-1:]), a + b[-1:]) if len(shape) > 1 else True
    wanted = a + b
    assert kernels.add(a, b, a) is a
    assert th.equal(a, wanted)
    to = th.zeros(shape)
    kernels.copy_(a, to)
    assert th.equal(to, a)
    kernels.clear_(to)
    assert not to.any()
    assert th.equal(kernels.zeros(a, *shape), th.zeros(shape))


def test_parts_are_joined(threads):
    whole = th.randn(3, 5, 40)
    parts = [whole[..., :7], whole[..., 7:8], whole[..., 8:]]
    assert th.equal(kernels.join(parts), whole)
    assert th.equal(kernels.join(parts[::-1]), th.cat(parts[::-1], -1))
    assert th.equal(kernels.join([whole[:1, 2:4], whole[:1, :2]], dim=1), whole[:1, [2, 3, 0, 1]])
    assert th.equal(kernels.join([whole[0], whole[2]], dim=0), th.cat([whole[0], whole[2]]))
    in_double = [part.double() for part in parts]
    assert th.equal(kernels.join(in_double), whole.double())


def test_exponentials():
    x, factors = th.linspace(-20, 5, 31), th.randn(31)
    th.testing.assert_close(kernels.exponential(x, added=0.25), x.exp() + 0.25)
    th.testing.assert_close(kernels.exponential(x, factors), factors * x.exp())


def test_least_values():
    values = th.randn(3, 4, 5)
    values[1, 2, 3] = th.nan
    assert th.equal(kernels.least(values).nan_to_num(9.0), values.amin(0).nan_to_num(9.0))
    assert th.equal(kernels.least(values[:1]), values[0])


@pytest.mark.parametrize("counted", [None, 0.5])
def test_termination_loss(counted):
    logits = 30 * th.randn(2, 4, 5)
    ended = (th.rand(4, 5) < 0.3).float()
    valid = None if counted is None else (th.rand(4, 5) < counted).float()
    leaf = logits.double().requires_grad_()
    losses = th.nn.functional.binary_cross_entropy_with_logits(
        leaf, ended.double().expand_as(leaf), reduction="none"
    )
    expected = (losses if valid is None else losses * valid).mean()
    (0.7 * expected).backward()
    loss = th.empty(())
    gradients = kernels.termination_loss(logits, ended, valid, 0.7, loss)
    th.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-9)
    th.testing.assert_close(gradients.double(), leaf.grad, rtol=1e-5, atol=1e-8)
