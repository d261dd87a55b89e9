"""``TDMPC2.save`` and ``load``: nothing pickled, nothing lost, one sentence on damage."""

from __future__ import annotations

import copy
import io
import json
import os
import zipfile

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from killing import run_script
from rl_zoo3.utils import SimpleLinearSchedule
from same_models import assert_same, assert_same_models, no_unpickling
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from tdmpc2_sb3 import TDMPC2

SETTINGS = {
    "latent_dim": 16,
    "enc_dim": 16,
    "mlp_dim": 16,
    "num_enc_layers": 2,
    "num_q": 2,
    "num_samples": 12,
    "num_elites": 4,
    "num_pi_trajs": 2,
    "num_iterations": 2,
    "batch_size": 4,
    "compile": False,
    "learning_starts": 12,
    "buffer_size": 600,
    "initial_gradient_steps": 2,
    "device": "cpu",
    "seed": 1,
}


ZERO = np.zeros(1)


def dmc(index: int = 0, steps: int = 9):
    """An environment that can be restored exactly, with short episodes."""

    def make() -> gymnasium.Env:
        import dmc_gym_plugin  # noqa: F401  # worker processes have not imported it

        return Monitor(gymnasium.make("DMC/cartpole-swingup-v0", max_episode_steps=steps + index))

    return make


def dmc_envs(n_envs: int = 1, normalize: bool = False, vec_env=DummyVecEnv):
    envs = vec_env([dmc(index) for index in range(n_envs)])
    return VecNormalize(envs) if normalize else envs


def small_model(env, policy="MlpPolicy", **kwargs) -> TDMPC2:
    return TDMPC2(policy, env, **{**SETTINGS, **kwargs})


def pendulum(**kwargs) -> TDMPC2:
    return small_model(gymnasium.make("Pendulum-v1"), episodic=False, gamma=0.98, **kwargs)


class Checkpoint(BaseCallback):
    """Saves model, buffer and normalisation at one step, as a checkpointing callback does."""

    def __init__(self, folder, step: int) -> None:
        super().__init__()
        self.folder = folder
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            self.model.save(self.folder / "model")
            self.model.save_replay_buffer(self.folder / "replay_buffer")
            if self.model.get_vec_normalize_env() is not None:
                self.model.get_vec_normalize_env().save(str(self.folder / "normalizer.pkl"))
        return True


def resume(folder, env, total: int, **kwargs) -> TDMPC2:
    if isinstance(env, VecNormalize):
        env = VecNormalize.load(str(folder / "normalizer.pkl"), env.venv)
    with no_unpickling():
        model = TDMPC2.load(folder / "model", env=env, device="cpu", **kwargs)
        model.load_replay_buffer(folder / "replay_buffer")
    return model.learn(total - model.num_timesteps, reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("n_envs", "kwargs", "normalize", "at"),
    [
        (1, {}, False, 22),  # in the middle of an episode
        (1, {}, False, 18),  # at an episode's end
        (1, {}, False, 7),  # before learning starts
        (1, {"train_freq": 4}, False, 22),  # in the middle of a rollout
        (2, {"train_freq": 3, "gradient_steps": -1}, False, 22),
        (2, {"policy": "SSMPolicy"}, True, 26),
        (1, {"train_freq": (1, "episode")}, False, 22),
        (1, {"use_planner": False, "learning_rate": SimpleLinearSchedule(1e-3)}, False, 22),
        (1, {"action_noise": OrnsteinUhlenbeckActionNoise(ZERO, ZERO + 0.3)}, False, 22),
        (2, {"action_noise": NormalActionNoise(ZERO, ZERO + 0.3)}, False, 22),
        (2, {"exploration_noise": "pink"}, False, 4),  # among the random steps
        (1, {"exploration_noise": "pink"}, False, 22),
        (1, {"exploration_noise": "pink", "use_planner": False}, False, 22),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, n_envs, kwargs, normalize, at):
    uninterrupted = small_model(dmc_envs(n_envs, normalize), **kwargs)
    uninterrupted.learn(40, callback=Checkpoint(tmp_path, at))
    np.random.seed(99)  # noqa: NPY002  # the global stream is elsewhere in another process
    resumed = resume(tmp_path, dmc_envs(n_envs, normalize), 40)
    assert_same_models(uninterrupted, resumed)
    assert uninterrupted._n_updates > 4


@pytest.mark.slow
def test_a_run_in_worker_processes_resumes_too(tmp_path):
    envs = [dmc_envs(2, vec_env=SubprocVecEnv) for _ in range(2)]
    try:
        uninterrupted = small_model(envs[0]).learn(40, callback=Checkpoint(tmp_path, 22))
        assert_same_models(uninterrupted, resume(tmp_path, envs[1], 40))
    finally:
        for env in envs:
            env.close()


def test_another_environment_closes_the_open_episode_as_truncated(tmp_path, capsys):
    model = pendulum(verbose=1).learn(25)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay_buffer")
    env = gymnasium.make("Pendulum-v1")
    loaded = TDMPC2.load(tmp_path / "model", env=env, device="cpu")
    loaded.load_replay_buffer(tmp_path / "replay_buffer")
    assert loaded.replay_buffer.rings.running.tolist() == [True]
    updates = loaded._n_updates
    loaded.learn(5, reset_num_timesteps=False)
    assert "closed as truncated" in capsys.readouterr().out
    assert loaded.num_timesteps == 30
    assert loaded._n_updates == updates + 5  # neither random steps nor the burst are repeated
    episode = loaded.replay_buffer.rings.longest_episode()
    assert episode == 25  # the first one ended where it was saved
    batch = loaded.replay_buffer.sample(200)
    assert batch.terminations.sum() == 0


@pytest.mark.parametrize("target", ["model", "model.zip", "stream", "file"])
def test_save_and_load_keep_everything(tmp_path, target):
    schedule = SimpleLinearSchedule(1e-3)
    model = pendulum(learning_rate=schedule, train_freq=(2, "step"), stats_window_size=7)
    model.learn(30)
    if target == "stream":
        stream = io.BytesIO()
        model.save(stream)
        stream.seek(0)
        source = stream
    elif target == "file":
        with open(tmp_path / "model.zip", "wb") as file:
            model.save(file)
        source = tmp_path / "model.zip"
    else:
        model.save(tmp_path / target)
        assert os.listdir(tmp_path) == ["model.zip"]
        source = str(tmp_path / "model")
    with no_unpickling():
        loaded = TDMPC2.load(source, device="cpu")
    assert_same(model.get_parameters(), loaded.get_parameters())
    assert loaded.train_freq == TrainFreq(2, TrainFrequencyUnit.STEP)
    assert repr(loaded.learning_rate) == repr(schedule)
    assert loaded.lr_schedule(0.5) == model.lr_schedule(0.5) == 5e-4
    assert loaded.observation_space == model.observation_space
    assert loaded.action_space == model.action_space
    assert loaded.ep_info_buffer.maxlen == 7
    assert loaded.replay_buffer.nbytes == 0  # nothing is allocated for predictions
    for name in SETTINGS:
        if name != "device":
            assert getattr(loaded, name) == getattr(model, name), name
    observations = np.stack([model.observation_space.sample() for _ in range(3)])
    for deterministic in (True, False):
        actions = model.predict(observations, deterministic=deterministic)[0]
        again = loaded.predict(observations, deterministic=deterministic)[0]
        assert actions.tobytes() == again.tobytes()


def test_a_file_for_playing_is_small_and_plays_the_same(tmp_path, capsys):
    model = TDMPC2("MlpPolicy", dmc()(), verbose=1, **SETTINGS).learn(40)
    model.save(tmp_path / "whole")
    model.save(tmp_path / "played", resumable=False)
    with zipfile.ZipFile(tmp_path / "played.zip") as archive:
        names = {name for name in archive.namelist() if name.endswith(".pth")}
        weights = th.load(archive.open("policy.pth"), weights_only=True)
    assert names == {"policy.pth"}
    assert weights.keys() == {
        name for name in model.policy.state_dict() if not name.startswith("world_model.target_")
    }
    whole, played = (TDMPC2.load(tmp_path / name, env=dmc()()) for name in ("whole", "played"))
    observation = model.observation_space.sample()
    expected, _ = whole.predict(observation, deterministic=True)
    np.testing.assert_array_equal(played.predict(observation, deterministic=True)[0], expected)
    assert played.num_timesteps == 40
    target, own = played.policy.world_model.target_q_ensemble, whole.policy.world_model.q_ensemble
    for ours, theirs in zip(target.parameters(), own.parameters(), strict=True):
        assert th.equal(ours, theirs)
        assert not ours.requires_grad
    # Further learning: new optimisers, said once, and a file that is whole again.
    assert not played.policy.model_optimizer.state_dict()["state"]
    capsys.readouterr()
    played.learn(30, reset_num_timesteps=False)
    assert "optimisers, target networks and random streams begin anew" in capsys.readouterr().out
    assert played.num_timesteps == 70
    assert played._n_updates > model._n_updates
    played.learn(2, reset_num_timesteps=False)
    assert "begin anew" not in capsys.readouterr().out
    played.save(tmp_path / "again")
    played.save_replay_buffer(tmp_path / "buffer")
    again = TDMPC2.load(tmp_path / "again", env=dmc()())
    again.load_replay_buffer(tmp_path / "buffer")
    assert_same_models(again, played)


@pytest.mark.parametrize("without", ["policy", "run_state"])
def test_a_file_for_playing_is_not_whole_by_a_flag(tmp_path, without):
    model = TDMPC2("MlpPolicy", dmc()(), **SETTINGS)
    model.save(tmp_path / "agent", resumable=without == "run_state")
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    document = json.loads(members["data.json"])
    if without == "policy":
        document["tensors"] = []
    else:
        del document["data"]["run_state"]
    members["data.json"] = json.dumps(document).encode()
    with zipfile.ZipFile(tmp_path / "agent.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="lacks 'policy'" if without == "policy" else "no whole"):
        TDMPC2.load(tmp_path / "agent")


def test_saving_disturbs_nothing(tmp_path):
    class Saving(BaseCallback):
        def _on_step(self) -> bool:
            self.model.save(tmp_path / "m")
            self.model.save_replay_buffer(tmp_path / "b")
            return True

    saved = small_model(dmc_envs()).learn(25, callback=Saving())
    assert_same_models(small_model(dmc_envs()).learn(25), saved)


def test_loading_as_enjoy_does(tmp_path):
    model = pendulum().learn(20)
    model.save(tmp_path / "m")
    custom = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    loaded = TDMPC2.load(tmp_path / "m", custom_objects=custom, seed=0, buffer_size=1, device="cpu")
    assert loaded.learning_rate == 0.0
    assert loaded.replay_buffer.nbytes == 0
    observation = model.observation_space.sample()
    action = model.predict(observation, deterministic=True)[0]
    assert loaded.predict(observation, deterministic=True)[0].shape == action.shape == (1,)


def test_set_parameters_from_file_dictionary_and_stream(tmp_path):
    source, target = pendulum(seed=3).learn(20), pendulum(seed=4)
    source.save(tmp_path / "m")
    parameters = copy.deepcopy(source.get_parameters())
    target.set_parameters(str(tmp_path / "m"))
    assert_same(target.get_parameters(), parameters)
    target = pendulum(seed=5)
    target.set_parameters(parameters)
    assert_same(target.get_parameters(), parameters)
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        target.set_parameters({"policy": parameters["policy"]})
    target.set_parameters({"policy": parameters["policy"]}, exact_match=False)


class ImageEnv(gymnasium.Env):
    """Stacked random frames beside a vector, or alone."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, with_vector: bool) -> None:
        self.with_vector = with_vector
        image = spaces.Box(0, 255, (9, 64, 64), np.uint8)
        vector = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.observation_space = (
            spaces.Dict({"vector": vector, "image": image}) if with_vector else image
        )

    def _observation(self):
        stack = np.concatenate(self.frames)
        vector = np.full(3, self.steps, dtype=np.float32)
        return {"vector": vector, "image": stack} if self.with_vector else stack

    def _frame(self):
        return self.np_random.integers(256, size=(3, 64, 64), dtype=np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.frames = [self._frame()] * 3
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        self.frames = [*self.frames[1:], self._frame()]
        return self._observation(), 1.0, self.steps % 5 == 0, False, {}


@pytest.mark.parametrize(
    ("policy", "with_vector"), [("CnnPolicy", False), ("MultiInputPolicy", True)]
)
def test_images_and_dictionaries(tmp_path, policy, with_vector):
    env = ImageEnv(with_vector)
    kwargs = {"episodic": True, "gamma": 0.9, "learning_starts": 8, "latent_dim": 512}
    model = small_model(env, policy, **kwargs).learn(14)
    model.save(tmp_path / "m")
    model.save_replay_buffer(tmp_path / "b")
    with no_unpickling():
        loaded = TDMPC2.load(tmp_path / "m", env=ImageEnv(with_vector), device="cpu")
        loaded.load_replay_buffer(tmp_path / "b")
    assert_same(model.get_parameters(), loaded.get_parameters())
    assert loaded.observation_space == model.observation_space
    samples = [m.replay_buffer.sample(20).observations for m in (model, loaded)]
    assert_same(*samples)
    images = model.replay_buffer.stored.storages["image" if with_vector else ""]
    assert images.rows.shape[1:] == (3, 64, 64)  # single frames
    observation = model.observation_space.sample()
    actions = [m.predict(observation, deterministic=True)[0] for m in (model, loaded)]
    assert actions[0].tobytes() == actions[1].tobytes()
    loaded.learn(3, reset_num_timesteps=False)


def test_what_needs_pickle_is_refused_and_the_old_file_stays(tmp_path):
    model = pendulum()
    model.my_function = lambda: 0
    with pytest.raises(TypeError, match=r"Cannot save 'my_function'.*function '.*lambda"):
        model.save(tmp_path / "m")
    assert os.listdir(tmp_path) == []
    model = pendulum()
    model.save(tmp_path / "m")
    before = (tmp_path / "m.zip").read_bytes()
    model.my_helper = object()
    with pytest.raises(TypeError, match=r"'my_helper': .*save\(exclude=\[\.\.\.\]\)"):
        model.save(tmp_path / "m")
    assert (tmp_path / "m.zip").read_bytes() == before
    model.save(tmp_path / "m", exclude=["my_helper"])
    TDMPC2.load(tmp_path / "m")


def test_damaged_and_foreign_files_are_one_sentence(tmp_path):
    model = pendulum()
    model.save(tmp_path / "m")
    content = (tmp_path / "m.zip").read_bytes()
    for length in (0, 10, len(content) // 3, len(content) // 2, len(content) - 5):
        (tmp_path / "t.zip").write_bytes(content[:length])
        for load in (TDMPC2.load, model.set_parameters):
            with pytest.raises(ValueError, match=r"'.*t\.zip' is .*truncated"):
                load(str(tmp_path / "t"))
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save(tmp_path / "sac")
    with pytest.raises(ValueError, match="was saved by pickling"):
        TDMPC2.load(tmp_path / "sac")
    with pytest.raises(FileNotFoundError, match="No saved file at"):
        TDMPC2.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        TDMPC2.load(tmp_path / "m", env=gymnasium.make("MountainCarContinuous-v0"))


def test_a_file_without_its_settings_is_one_sentence(tmp_path):
    pendulum().save(tmp_path / "m")
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for missing in ("data.json", "policy.pth", "run_streams.pth"):
        with zipfile.ZipFile(tmp_path / "n.zip", "w") as archive:
            for name, content in members.items():
                if name != missing:
                    archive.writestr(name, content)
        with pytest.raises(ValueError, match=r".") as caught:
            TDMPC2.load(tmp_path / "n")
        assert "\n" not in str(caught.value)


def test_buffers_of_another_shape_are_refused(tmp_path):
    model = pendulum().learn(15)
    model.save_replay_buffer(tmp_path / "b")
    with pytest.raises(ValueError, match="rows per environment = 600 and this one 700"):
        pendulum(buffer_size=700).load_replay_buffer(tmp_path / "b")


KILLED = """
import sys
import gymnasium
from killing import kill_at_random_moments
from tdmpc2_sb3 import TDMPC2

path, times, settings = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
env = gymnasium.make("Pendulum-v1")
model = TDMPC2("MlpPolicy", env, gamma=0.9, episodic=False, **settings)
steps = []

def save():
    model.num_timesteps += 1
    model.save(path)

def check():
    global model
    model = TDMPC2.load(path, env=env, device="cpu")
    assert model.num_timesteps > (steps[-1] if steps else 0)
    steps.append(model.num_timesteps)

kill_at_random_moments(save, check, times)
print(len(steps))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_model_loads(tmp_path, times):
    assert int(run_script(KILLED, tmp_path / "m.zip", times, SETTINGS)) == times
    assert len(os.listdir(tmp_path)) <= 2
