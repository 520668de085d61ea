"""From logits to tokens: what may be chosen, what is chosen, and its log-probabilities."""
