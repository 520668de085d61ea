"""The audio tokenizer's `config.json`, in the published words.

The published class has defaults of another, smaller model, so every size must be given: a config without one
is refused, not filled in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sateen.errors import ConfigError, unknown_name
from sateen.models.mimo_audio.tokenizer_presets import AUDIO_TOKENIZER_PRESETS
from sateen.nn.mel import MelSettings

# The only values of these keys that the modules implement.
IMPLEMENTED = {
    "activation_function": "gelu",
    "position_embedding_type": "rope",
    "rope_type": "default",
    "ln_type": "LayerNorm",
    "vocoder_padding": "same",
    "kernel_size": 3,
}


@dataclass(frozen=True)
class AudioTokenizerConfig:
    """The shape of an audio tokenizer; attribute names are the keys of its config.json.

    Attributes:
        d_model: width D of the encoder, the quantizer and the decoder.
        encoder_skip_layer_id: the layer, counted from 1, whose output is added to the last layer's.
        encoder_attn_window_size: (left, right) frames seen beside the own one; -1 is unlimited.
        stride_size: of the encoder's second convolution; avg_pooler of the last one, before the quantizer.
        nfft, window_size, hop_length, n_mels, sampling_rate, fmin, fmax: the mel front end (samples, Hz).
        vocoder_attn_window_size: (left, right) mel frames of the vocoder's attention.
        codebook_size: entries C of each residual stage.
        threshold_ema_dead_code: an entry used less often per batch than this is replaced in training.
        extra: keys of the file that nothing here reads; written back as they came.

    Source: MiMo-Audio, arXiv 2512.23808 §2.1, and the published modules (XiaomiMiMo/MiMo-Audio).
    """

    d_model: int
    encoder_layers: int
    encoder_skip_layer_id: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    encoder_causal: bool
    encoder_attn_window_size: tuple[int, int]
    decoder_layers: int
    decoder_attention_heads: int
    decoder_ffn_dim: int
    decoder_causal: bool
    decoder_attn_window_size: tuple[int, int]
    nfft: int
    window_size: int
    hop_length: int
    n_mels: int
    sampling_rate: int
    vocoder_dim: int
    vocoder_intermediate_dim: int
    vocoder_num_layers: int
    vocoder_attention_heads: int
    vocoder_attn_window_size: tuple[int, int]
    num_quantizers: int
    codebook_size: tuple[int, ...]
    stride_size: int = 2
    avg_pooler: int = 2
    kernel_size: int = 3
    decoder_kernel_size: int = 3
    decoder_stride_size: int = 2
    fmin: float = 0
    fmax: float | None = None
    threshold_ema_dead_code: float = 2
    rope_theta: float = 10000
    activation_function: str = "gelu"
    position_embedding_type: str = "rope"
    rope_type: str = "default"
    ln_type: str = "LayerNorm"
    vocoder_padding: str = "same"
    scale_embedding: bool = False
    max_audio_seconds: float = 1800
    model_type: str = "mimo_audio_tokenizer"
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for key, value in IMPLEMENTED.items():
            if getattr(self, key) != value:
                raise ConfigError(f"audio tokenizer: {key} {getattr(self, key)!r} (accepted: {value!r})")
        for part in ("encoder", "decoder", "vocoder"):
            width = self.vocoder_dim if part == "vocoder" else self.d_model
            heads = getattr(self, f"{part}_attention_heads")
            if heads < 1 or width % heads or width // heads % 2:
                raise ConfigError(
                    f"audio tokenizer: {part}_attention_heads {heads} for width {width}; accepted: a divisor "
                    "with an even quotient"
                )
        if len(self.codebook_size) != self.num_quantizers:
            raise ConfigError(
                f"audio tokenizer: codebook_size lists {len(self.codebook_size)} stages for num_quantizers "
                f"{self.num_quantizers}"
            )
        if self.nfft != self.window_size or (self.window_size - self.hop_length) % 2:
            raise ConfigError(
                f"audio tokenizer: nfft {self.nfft}, window_size {self.window_size}, hop_length "
                f"{self.hop_length}; accepted: equal nfft and window_size, an even distance to the hop"
            )
        if not 1 <= self.encoder_skip_layer_id <= self.encoder_layers:
            raise ConfigError(
                f"audio tokenizer: encoder_skip_layer_id {self.encoder_skip_layer_id} "
                f"(accepted: 1 to {self.encoder_layers})"
            )
        if self.decoder_kernel_size < self.decoder_stride_size or min(self.stride_size, self.avg_pooler) < 2:
            raise ConfigError(
                f"audio tokenizer: decoder_kernel_size {self.decoder_kernel_size}, decoder_stride_size "
                f"{self.decoder_stride_size}, stride_size {self.stride_size}, avg_pooler {self.avg_pooler}; "
                "accepted: a kernel not shorter than its stride, strides of 2 or more"
            )
        if self.stride_size != self.decoder_stride_size:
            raise ConfigError(
                f"audio tokenizer: stride_size {self.stride_size} and decoder_stride_size "
                f"{self.decoder_stride_size} must agree, or the output has another length than the input"
            )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, origin: str = "config.json") -> AudioTokenizerConfig:
        """The config that a config.json describes; unknown keys are kept.

        Raises:
            ConfigError: another model_type, a missing size or a value that is not implemented.
        """
        if raw.get("model_type", "mimo_audio_tokenizer") != "mimo_audio_tokenizer":
            raise ConfigError(
                f"{origin}: model_type {raw['model_type']!r} is not an audio tokenizer "
                "(accepted: 'mimo_audio_tokenizer')"
            )
        known = {f.name for f in fields(cls)} - {"extra"}
        values = {key: _frozen(value) for key, value in raw.items() if key in known}
        if isinstance(values.get("codebook_size"), int):
            values["codebook_size"] = (values["codebook_size"],) * int(raw.get("num_quantizers", 1))
        extra = {key: copy.deepcopy(value) for key, value in raw.items() if key not in known}
        try:
            return cls(**values, extra=extra)
        except TypeError as error:
            raise ConfigError(f"{origin}: {str(error).removeprefix('AudioTokenizerConfig.')}") from None
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The dictionary for config.json: every published key, then the unknown ones."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in ours.items()}
        return lists | copy.deepcopy(dict(self.extra))

    @property
    def mel(self) -> MelSettings:
        """The settings of the mel front end."""
        return MelSettings(
            self.sampling_rate,
            self.nfft,
            self.window_size,
            self.hop_length,
            self.n_mels,
            self.fmin,
            self.fmax,
        )

    @property
    def frames_per_token(self) -> int:
        return self.stride_size * self.avg_pooler

    @property
    def samples_per_token(self) -> int:
        """Samples that one token decodes to."""
        return self.hop_length * self.frames_per_token

    @property
    def token_rate_hz(self) -> float:
        return self.sampling_rate / self.samples_per_token

    @property
    def segment_frames(self) -> int:
        """Mel frames of the 60 s pieces that long clips are cut into."""
        return 60 * self.sampling_rate // self.hop_length

    @property
    def segment_tokens(self) -> int:
        """Tokens of 60 s."""
        return self.segment_frames // self.frames_per_token

    def num_tokens(self, num_frames: int) -> int:
        """Tokens of one segment of mel frames: both strides round up."""
        num_halved = -(-num_frames // self.stride_size)
        return -(-num_halved // self.avg_pooler)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def audio_tokenizer_preset(name: str) -> AudioTokenizerConfig:
    """The config of a preset.

    Raises:
        ConfigError: no preset has this name; the message lists them.
    """
    if name not in AUDIO_TOKENIZER_PRESETS:
        raise ConfigError(unknown_name("audio tokenizer preset", name, AUDIO_TOKENIZER_PRESETS))
    return AudioTokenizerConfig.from_hf(AUDIO_TOKENIZER_PRESETS[name], origin=f"preset {name}")
