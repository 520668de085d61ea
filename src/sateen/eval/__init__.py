"""Measures of models: bits per byte, checked tasks, acceptance of drafts, and plain baselines."""
