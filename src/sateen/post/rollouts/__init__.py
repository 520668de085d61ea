"""Sampling answers: the launch decisions of the seamless rollout engine."""
