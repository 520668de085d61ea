"""Where keys and values of the tokens so far stand: pages, rings, and what prompts have in common."""
