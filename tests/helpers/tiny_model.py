"""A model so small that a test can train it."""

from __future__ import annotations

TINY = {
    "latent_dim": 16,
    "enc_dim": 16,
    "mlp_dim": 16,
    "num_q": 2,
    "num_samples": 16,
    "num_pi_trajs": 2,
    "num_elites": 4,
    "num_iterations": 2,
    "batch_size": 8,
    "seed": 5,
    "device": "cpu",
}
