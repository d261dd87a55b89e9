"""TD-MPC2 for Stable-Baselines3: model-based reinforcement learning with MLP or SSM dynamics."""

from __future__ import annotations

from tdmpc2_sb3.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SSMPolicy
from tdmpc2_sb3.replay.buffer import SequenceBatch, SequenceReplayBuffer
from tdmpc2_sb3.saving.renamed import keep_former_names
from tdmpc2_sb3.tdmpc2 import TDMPC2

__all__ = [
    "TDMPC2",
    "CnnPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "SSMPolicy",
    "SequenceBatch",
    "SequenceReplayBuffer",
]

keep_former_names()
