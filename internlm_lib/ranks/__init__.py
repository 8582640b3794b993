"""Ranks of a parallel job: how they are started, watched and stopped."""
