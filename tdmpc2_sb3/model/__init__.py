"""The world model: its networks, its latent dynamics, and the arithmetic of its outputs."""
