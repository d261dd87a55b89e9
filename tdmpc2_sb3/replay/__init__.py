"""The replay buffer: steps of episodes in, sub-sequences of them out, and its file."""
