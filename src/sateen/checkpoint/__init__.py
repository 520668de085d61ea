"""Model directories in Hugging Face's layout, and training state that survives a kill."""
