"""The authors' checkpoint layout, written here from plain tensors in both of their formats."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from tdmpc2_sb3 import TDMPC2

OBS, A, Z, ENC, MLP, Q, K = 3, 2, 24, 10, 12, 4, 101
NAMES = ("weight", "bias", "ln.weight", "ln.bias")


def draw(*shape, seed):
    return 0.3 * th.randn(*shape, generator=th.Generator().manual_seed(seed))


def official_layers(prefix, widths, last_normed, members=()):
    """Named tensors of an MLP in the authors' layout, stacked over ``members`` if given."""
    state = {}
    for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        seed = 10 * i + len(prefix)
        state[f"{prefix}{i}.weight"] = draw(*members, width_out, width_in, seed=seed)
        state[f"{prefix}{i}.bias"] = draw(*members, width_out, seed=seed + 1)
        if i < len(widths) - 2 or last_normed:
            state[f"{prefix}{i}.ln.weight"] = 1 + draw(*members, width_out, seed=seed + 2)
            state[f"{prefix}{i}.ln.bias"] = draw(*members, width_out, seed=seed + 3)
    return state


def official_state(episodic=False, hidden=1, pixels=False):
    """A checkpoint's state dict in the present format."""
    heads = official_layers("_Qs.params.", [Z + A, MLP, MLP, K], False, (Q,))
    state = {
        "log_std_min": th.tensor(-10.0),
        "log_std_dif": th.tensor(12.0),
        **official_layers("_dynamics.", [Z + A, MLP, MLP, Z], True),
        **official_layers("_reward.", [Z + A, MLP, MLP, K], False),
        **official_layers("_pi.", [Z, MLP, MLP, 2 * A], False),
        **heads,
        **{key.replace("_Qs.params", "_detach_Qs_params"): v for key, v in heads.items()},
        **official_layers("_target_Qs_params.", [Z + A, MLP, MLP, K], False, (Q,)),
    }
    if episodic:
        state.update(official_layers("_termination.", [Z, MLP, MLP, 1], False))
    state.update(official_layers("_encoder.state.", [OBS, *[ENC] * hidden, Z], True))
    return state


def flattened(state):
    """The older format: ensembles numbered, no second copy, no constants."""
    old = {}
    for key, value in state.items():
        if key.startswith(("_detach", "log_std")):
            continue
        for new, prefix in (("_Qs.params.", "_Qs.params."),
                            ("_target_Qs_params.", "_target_Qs.params.")):  # fmt: skip
            if key.startswith(new):
                layer, name = key[len(new) :].split(".", 1)
                key = f"{prefix}{4 * int(layer) + NAMES.index(name)}"
                break
        old[key] = value
    return old


def with_placeholders(state):
    """What the authors' libraries add in one version or another."""
    return {
        **state,
        "_Qs.params.__batch_size": th.Size([Q]),
        "_target_Qs_params.__device": None,
        "_Qs.module.0.weight": th.empty(MLP, Z + A, device="meta"),
        "_detach_Qs.module.0.weight": th.empty(Q, MLP, Z + A, device="meta"),
        "_action_masks": th.zeros(1, A),
    }


FORMATS = {
    "present": lambda state: state,
    "older": flattened,
    "placeholders": with_placeholders,
    "placeholders, older": lambda state: {**flattened(state), "_action_masks": th.zeros(1, A)},
}


# -- the forward pass by the authors' names -----------------------------------------------------


def forward(state, prefix, x, simnorm=False, member=None):
    count = len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
    for i in range(count):
        weight, bias, ln_weight, ln_bias = (
            state.get(f"{prefix}{i}.{name}")[member] if member is not None
            and f"{prefix}{i}.{name}" in state else state.get(f"{prefix}{i}.{name}")
            for name in NAMES
        )  # fmt: skip
        x = F.linear(x, weight, bias)
        if ln_weight is not None:
            x = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias)
            x = F.mish(x) if i < count - 1 else x
    if simnorm:
        x = F.softmax(x.view(*x.shape[:-1], -1, 8), -1).view(x.shape)
    return x


def scalar(logits):
    return th.special.expm1((F.softmax(logits, -1) * th.linspace(-10, 10, K)).sum(-1).abs()) * (
        (F.softmax(logits, -1) * th.linspace(-10, 10, K)).sum(-1).sign()
    )


@pytest.fixture
def load(tmp_path, point_env, tiny):
    def load(state, env=None, **kwargs):
        path = tmp_path / "checkpoint.pt"
        th.save({"model": state}, path)
        settings = {
            name: value
            for name, value in tiny.items()
            if name not in ("latent_dim", "enc_dim", "mlp_dim", "num_q", "num_enc_layers")
        }
        env = point_env() if env is None else env
        return TDMPC2.load_official(path, env, **{**settings, **kwargs})

    return load


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("episodic", "hidden"), [(False, 1), (True, 3)])
def test_outputs_are_those_of_the_plain_forward_pass(load, form, episodic, hidden):
    state = official_state(episodic, hidden)
    agent = load(FORMATS[form](state))
    model = agent.policy.world_model
    assert model.episodic is episodic
    o = th.randn(20, OBS, generator=th.Generator().manual_seed(1))
    a = th.rand(20, A, generator=th.Generator().manual_seed(2)) * 2 - 1
    close = {"rtol": 1e-5, "atol": 1e-5}

    z = forward(state, "_encoder.state.", o, simnorm=True)
    th.testing.assert_close(model.encode(o), z, **close)
    th.testing.assert_close(model.encode(o).view(20, -1, 8).sum(-1), th.ones(20, Z // 8))
    za = th.cat([z, a], -1)
    next_z = forward(state, "_dynamics.", za, simnorm=True)
    dynamics = model.dynamics
    th.testing.assert_close(dynamics.step(dynamics.initial_state(z), a)[0], next_z, **close)
    th.testing.assert_close(model.reward(z, a), scalar(forward(state, "_reward.", za)), **close)
    heads = th.arange(Q)
    for values, prefix in (
        (model.q_values(z, a), "_Qs.params."),
        (model.target_q_values(z, a, heads), "_target_Qs_params."),
    ):
        expected = th.stack([scalar(forward(state, prefix, za, member=q)) for q in range(Q)])
        th.testing.assert_close(values, expected, **close)
    mean, s = forward(state, "_pi.", z).chunk(2, -1)
    th.testing.assert_close(model.policy_action(z, None), th.tanh(mean), **close)
    std = th.exp(-10 + 6 * (th.tanh(s) + 1))
    th.testing.assert_close(model.policy_action(z, th.ones(20, A)), th.tanh(mean + std), **close)
    if episodic:
        expected = forward(state, "_termination.", z).squeeze(-1)
        th.testing.assert_close(model.termination_logit(z), expected, **close)


def test_sizes_are_those_of_the_file_and_the_rest_is_the_users(load):
    agent = load(official_state(True, 2), num_samples=40, gamma=0.9, learning_starts=0)
    sizes = (agent.latent_dim, agent.enc_dim, agent.mlp_dim, agent.num_enc_layers, agent.num_q)
    assert sizes == (Z, ENC, MLP, 3, Q)
    assert agent.episodic is True
    assert (agent.num_samples, agent.gamma) == (40, 0.9)
    agent.learn(30)  # and it goes on learning
    assert agent._n_updates > 0


def test_there_and_back(load, tmp_path, point_env):
    agent = load(official_state(True, 2))
    agent.save_official(tmp_path / "again")
    content = th.load(tmp_path / "again.pt", weights_only=True)["model"]
    state = official_state(True, 2)
    assert {key for key in content if "__" not in key} == set(state)
    for key, value in state.items():
        assert th.equal(content[key], value), key
    for prefix in ("_Qs.params.", "_detach_Qs_params.", "_target_Qs_params."):
        assert content[prefix + "__batch_size"] == th.Size([Q])
        assert content[prefix + "__device"] is None
    again = TDMPC2.load_official(tmp_path / "again.pt", point_env(), device="cpu")
    ours, theirs = agent.policy.world_model.state_dict(), again.policy.world_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(th.equal(ours[name], theirs[name]) for name in ours)


def test_entries_of_empty_modules_on_request(load, tmp_path):
    load(official_state()).save_official(tmp_path / "c.pt", module_placeholders=True)
    content = th.load(tmp_path / "c.pt", weights_only=True)["model"]
    empty = {key: value for key, value in content.items() if ".module." in key}
    assert all(value.device.type == "meta" for value in empty.values())
    assert empty["_Qs.module.0.weight"].shape == (MLP, Z + A)
    assert empty["_target_Qs.module.2.bias"].shape == (Q, K)
    assert len(empty) == 3 * 10


def test_a_new_agents_deterministic_actions_survive(make_agent, tmp_path, point_env, tiny):
    agent = make_agent()
    agent.learn(30)
    agent.save_official(tmp_path / "c.pt")
    same = {k: tiny[k] for k in ("num_samples", "num_elites", "num_pi_trajs", "num_iterations")}
    again = TDMPC2.load_official(tmp_path / "c.pt", point_env(), device="cpu", **same)
    observation = np.array([0.1, 0.01, 0.5], np.float32)
    expected, _ = agent.predict(observation, deterministic=True)
    np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], expected)


def test_pixels(tmp_path, point_env, make_agent):
    th.manual_seed(0)
    # Random shift and scaling come first in theirs; the convolutions are layers 2, 4, 6 and 8.
    layers = [nn.Conv2d(3, 32, 7, 2), nn.Conv2d(32, 32, 5, 2), nn.Conv2d(32, 32, 3, 2),
              nn.Conv2d(32, 32, 3, 1)]  # fmt: skip
    agent = make_agent(point_env(kind="image"), "CnnPolicy", latent_dim=512)
    agent.save_official(tmp_path / "c.pt")
    state = th.load(tmp_path / "c.pt", weights_only=True)["model"]
    for i, layer in zip((2, 4, 6, 8), layers, strict=True):
        assert state[f"_encoder.rgb.{i}.weight"].shape == layer.weight.shape
        state[f"_encoder.rgb.{i}.weight"] = layer.weight.detach()
        state[f"_encoder.rgb.{i}.bias"] = layer.bias.detach()
    th.save({"model": state}, tmp_path / "c.pt")
    again = TDMPC2.load_official(tmp_path / "c.pt", point_env(kind="image"), device="cpu")
    assert type(again.policy).__name__ == "CnnPolicy"
    images = th.randint(0, 256, (4, 3, 64, 64), generator=th.Generator().manual_seed(0))
    x = images / 255 - 0.5
    for i, layer in enumerate(layers):
        x = layer(x) if i == 3 else F.relu(layer(x))
    expected = F.softmax(x.view(4, 64, 8), -1).view(4, 512)
    z = again.policy.world_model.encode(images.to(th.uint8))
    th.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)


# -- errors -------------------------------------------------------------------------------------


def without(key):
    return {name: value for name, value in official_state().items() if name != key}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"actor.0.weight": th.zeros(2)}, "no TD-MPC2 checkpoint .* load_official those of"),
        (
            {**official_state(), "_task_emb.weight": th.zeros(30, 96)},
            "a multi-task checkpoint: choose one of the single-task",
        ),
        (without("_dynamics.2.weight"), "no entry '_dynamics.2.weight': it is incomplete"),
        (without("_pi.1.ln.bias"), r"lacks entry '_pi.1.ln.bias': it is incomplete"),
        (
            {**official_state(), "_new_part.weight": th.zeros(2)},
            "has the unknown entry '_new_part.weight'",
        ),
        (
            {**official_state(), "_pi.1.bias": th.zeros(MLP + 1)},
            rf"'_pi.1.bias' has shape \({MLP + 1},\) where \({MLP},\) is needed",
        ),
        (
            {**official_state(), "log_std_min": th.tensor(-20.0)},
            "log_std_min is -20 and this package's policy prior has -10",
        ),
    ],
)
def test_other_contents(load, state, message):
    with pytest.raises(ValueError, match=message):
        load(state)


@pytest.mark.parametrize("name", ["Pendulum-v1", "DMC/walker-walk-v0"])
def test_another_environment(load, name):
    import dmc_gym_plugin  # noqa: F401

    with pytest.raises(ValueError, match=r"was made for \d+ (actions|observations) and the env"):
        load(official_state(), name)


def test_contradicting_arguments(load):
    with pytest.raises(ValueError, match=r"latent_dim is 512 but the checkpoint was made with 24"):
        load(official_state(), latent_dim=512)
    with pytest.raises(ValueError, match=r"episodic is True but .* with False: leave it out"):
        load(official_state(), episodic=True)
    with pytest.raises(ValueError, match="dynamics is 'ssm' but"):
        load(official_state(), dynamics="ssm")


def test_damaged_and_missing_files(tmp_path, point_env):
    with pytest.raises(FileNotFoundError, match="nothing"):
        TDMPC2.load_official(tmp_path / "nothing.pt", point_env())
    path = tmp_path / "c.pt"
    th.save({"model": official_state()}, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"c\.pt' cannot be read as a torch file .* download"):
        TDMPC2.load_official(path, point_env())


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_nothing_is_unpickled(tmp_path, point_env, way):
    path = tmp_path / "c.pt"
    content = {"model": official_state(), "more": Trap()}
    if way == "torch":
        th.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="holds pickled objects"):
        TDMPC2.load_official(path, point_env())


@pytest.mark.parametrize(
    ("kind", "policy", "settings", "problem"),
    [
        ("vector", "SSMPolicy", {}, "its dynamics are SSMDynamics"),
        ("dict", "MultiInputPolicy", {}, "its observations are dictionaries"),
        ("image", "CnnPolicy", {}, "its images or its latent_dim"),
    ],
)
def test_models_that_the_authors_do_not_have(
    make_agent, point_env, tmp_path, kind, policy, settings, problem
):
    agent = make_agent(point_env(kind=kind), policy, **settings)
    with pytest.raises(ValueError, match=f"save_official writes .* but {problem}.*: use save"):
        agent.save_official(tmp_path / "c.pt")
    assert not (tmp_path / "c.pt").exists()
