"""Sound to codes and back, and the engine of audio language models: `sateen audio`."""
