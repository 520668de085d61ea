"""Training: one step, its objectives and optimizers, and the text stages."""
