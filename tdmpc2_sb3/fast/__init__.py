"""Whole plans and whole gradient steps in fewer and faster calls than the plain text needs.

What plans and gradient steps are stands in :mod:`tdmpc2_sb3.planner` and :mod:`tdmpc2_sb3.losses`;
whatever is here computes the same numbers up to rounding, or declines.
"""
