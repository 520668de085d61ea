"""Rewards that a program can compute: mathematics, code in a sandbox, and what their tests are worth."""
