"""The plug-in for RL Baselines3 Zoo: what is added to the unmodified zoo, and where.

- `algorithms.py`: which algorithms and environments are ours, and their YAML files;
- `register.py`: which module of the zoo gets which addition;
- `experiments.py`: training and tuning (`rl_zoo3.exp_manager`);
- `playback.py`: enjoy, record_video and push_to_hub build the environment as training did;
- `hub.py`: model card and download (`huggingface_sb3`, `huggingface_hub`);
- `passwords.py`, `scrubbing.py`: what must not be written, and what must not be uploaded;
- `checkpoints.py`, `trust.py`, `resume.py`: going on with a run, and what it may run;
- `export.py`: a run's agent in a small folder;
- `search_space.py`: Optuna's ranges;
- `__main__.py`: `python -m tdmpc2_sb3.zoo train ...`, the way that needs no start-up hook.
"""
