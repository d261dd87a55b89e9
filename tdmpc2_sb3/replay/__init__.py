"""What comes from the environments: facts about them, observations as arrays, the replay buffer.

Steps of episodes go into the buffer, sub-sequences of them come out.
"""
