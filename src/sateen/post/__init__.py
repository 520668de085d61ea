"""Post-training: rollouts by an engine, algorithms that weight their tokens, and stages that join them."""
