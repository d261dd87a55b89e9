"""Latent dynamics by name. A new kind is one class and one line here."""

from __future__ import annotations

from tdmpc2_sb3.model.dynamics.base import DynamicsState, LatentDynamics
from tdmpc2_sb3.model.dynamics.mlp import MLPDynamics
from tdmpc2_sb3.model.dynamics.ssm import SSMDynamics

DYNAMICS: dict[str, type[LatentDynamics]] = {
    "mlp": MLPDynamics,
    "ssm": SSMDynamics,
}

__all__ = ["DYNAMICS", "DynamicsState", "LatentDynamics", "MLPDynamics", "SSMDynamics"]
