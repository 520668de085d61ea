"""MiMo-Audio: the audio tokenizer and the language model that reads and writes its codes."""
