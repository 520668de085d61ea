"""The name under which `AudioEngine` was first documented; its code is in `sateen.engine.audio.lm`."""

from sateen.engine.audio.lm import AudioEngine, AudioOutput

__all__ = ["AudioEngine", "AudioOutput"]
