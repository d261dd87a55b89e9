"""Experiments: a YAML grid of arms, tasks and seeds over the zoo's own command, and its report.

`python -m tdmpc2_sb3.study run FILE.yml`; docs/experiments.md is the guide.
"""
