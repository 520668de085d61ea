"""MiMo-Audio's language model as its config.json describes it: Qwen2's trunk and what the audio side adds.

The published config says `model_type` "qwen2"; the audio keys tell it apart. It does not hold the ids of the
special tokens (the published code looks them up by string); our key `audio_token_ids` holds them, and the
published ids are the default (source: ours). Source: MiMo-Audio, arXiv 2512.23808 §2.2 and Table 2, and its
published code (XiaomiMiMo/MiMo-Audio, modeling_mimo_audio.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from sateen.errors import ConfigError
from sateen.models import llama
from sateen.models.base import Family, ModelConfig, plain_entries, rope_theta
from sateen.nn.spec import LayerSpec

if TYPE_CHECKING:
    from sateen.models.decoder import Decoder

log = logging.getLogger("sateen.models")


@dataclass(frozen=True)
class AudioTokens:
    """Ids of the text tokens that the audio layout needs; the defaults are the published ones.

    Attributes:
        sosp: before audio input. eosp: behind it.
        empty: the text id of every audio position.
        human, speechlm: speakers of the base model's dialogues; no layout here uses them.
        sostm: before streamed output, which interleaves text and audio. eostm: behind it.
        eot: ends the text inside a stream.
    """

    sosp: int = 151665
    eosp: int = 151666
    empty: int = 151667
    human: int = 151668
    speechlm: int = 151669
    sostm: int = 151670
    eostm: int = 151671
    eot: int = 151672

    @classmethod
    def of(cls, token_id: Callable[[str], int]) -> AudioTokens:
        """The ids that a tokenizer gives to `TOKEN_STRINGS`, in their order."""
        return cls(*(token_id(text) for text in TOKEN_STRINGS))

    def to_dict(self) -> dict[str, int]:
        """The value of the config key `audio_token_ids`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


TOKEN_STRINGS = (
    "<|sosp|>", "<|eosp|>", "<|empty|>", "<|Human|>", "<|SpeechLM|>", "<|sostm|>", "<|eostm|>", "<|eot|>",
)  # fmt: skip
"""What a tokenizer must have beside ChatML's tokens, in the order of `AudioTokens`."""


@dataclass(frozen=True)
class AudioSpec:
    """The audio side of the model; R channels, one per codebook.

    Attributes:
        group_size: frames G of a patch, which is one position of the language model.
        vocab_sizes: per channel the codebook's entries and the empty id.
        empty_ids: per channel the id that stands where there is no code.
        delays: per channel the step of the patch decoder that writes its first frame.
        tokens: special text ids.
        encoder_dim: width of the patch encoder and of the code embeddings.
        decoder_dim: width of the patch decoder.
        encoder_layers: specs of the patch encoder.
        decoder_layers: specs of the patch decoder.
        is_bidirectional: all frames of a patch see each other in the encoder; causal otherwise.
    """

    group_size: int
    vocab_sizes: tuple[int, ...]
    empty_ids: tuple[int, ...]
    delays: tuple[int, ...]
    tokens: AudioTokens
    encoder_dim: int
    decoder_dim: int
    encoder_layers: tuple[LayerSpec, ...]
    decoder_layers: tuple[LayerSpec, ...]
    is_bidirectional: bool

    @property
    def channels(self) -> int:
        return len(self.vocab_sizes)

    @property
    def num_steps(self) -> int:
        """Steps of the patch decoder per patch: 11 for 4 frames and delays 0 to 7."""
        return self.group_size + max(self.delays)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> AudioSpec:
        """The audio side of a config dictionary.

        Raises:
            ConfigError: channels that do not agree, widths that heads do not divide, ids out of range.
        """
        channels, group = int(raw["audio_channels"]), int(raw["group_size"])
        vocab_sizes, empty_ids, delays = (
            _per_channel(raw, key, channels)
            for key in ("speech_vocab_size", "speech_zeroemb_idx", "delay_pattern")
        )
        if any(not 0 <= empty < size for empty, size in zip(empty_ids, vocab_sizes, strict=True)):
            raise ConfigError(
                f"config.json: speech_zeroemb_idx {raw['speech_zeroemb_idx']!r} must lie inside "
                f"speech_vocab_size {raw['speech_vocab_size']!r}, channel by channel"
            )
        tokens = AudioTokens(**dict(raw.get("audio_token_ids") or {}))
        if max(astuple(tokens)) >= int(raw["vocab_size"]) or len(set(astuple(tokens))) != len(fields(tokens)):
            raise ConfigError(
                f"config.json: the special tokens {tokens.to_dict()} must be different and below vocab_size "
                f"{raw['vocab_size']}; give audio_token_ids"
            )
        decoder_dim = int(raw["local_dim"])
        encoder_dim = int(raw.get("input_local_dim") or decoder_dim)
        return cls(
            group_size=group,
            vocab_sizes=vocab_sizes,
            empty_ids=empty_ids,
            delays=delays,
            tokens=tokens,
            encoder_dim=encoder_dim,
            decoder_dim=decoder_dim,
            encoder_layers=_small(raw, int(raw["input_local_layers"]), encoder_dim, 4 * encoder_dim),
            decoder_layers=_small(raw, int(raw["local_layers"]), decoder_dim, int(raw["local_ffn_dim"])),
            is_bidirectional=bool(raw.get("input_full_attention")),
        )


def _per_channel(raw: Mapping[str, Any], key: str, channels: int) -> tuple[int, ...]:
    """Dash-joined numbers, one per channel; a single number stands for all channels."""
    parts = [int(part) for part in str(raw[key]).split("-")]
    parts = parts * channels if len(parts) == 1 else parts
    if len(parts) != channels:
        raise ConfigError(f"config.json: {key} {raw[key]!r} lists {len(parts)} of {channels} audio_channels")
    return tuple(parts)


def _small(raw: Mapping[str, Any], count: int, dim: int, ffn: int) -> tuple[LayerSpec, ...]:
    """The layers of a small transformer: every head has its own keys, 16 channels wide in the release."""
    heads = int(raw["local_attn_heads"])
    if dim % heads or (dim // heads) % 2:
        raise ConfigError(f"config.json: a width of {dim} does not split into {heads} heads of even size")
    theta = float(raw.get("local_rotary_base") or rope_theta(raw, 10000.0))
    spec = LayerSpec(
        index=0,
        attention="full_attention",
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=dim // heads,
        v_head_dim=dim // heads,
        rope_theta=theta,
        rotary_dim=dim // heads,
        qkv_bias=True,
        intermediate_size=ffn,
    )
    return tuple(replace(spec, index=index) for index in range(count))


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    AudioSpec.from_hf(raw)  # refuses here what `AudioLM` could not build
    if raw.get("local_attn_dropout"):
        log.info("config.json: local_attn_dropout %s is not applied", raw["local_attn_dropout"])
    trunk = llama.parse({**raw, "model_type": "qwen2"})
    return replace(trunk, model_type="mimo_audio", raw=raw)


def build(config: ModelConfig) -> Decoder:
    """The language model with its audio side."""
    from sateen.models.mimo_audio.lm import AudioLM

    return AudioLM(config)


KEYS = llama.KEYS | frozenset(
    "audio_channels audio_token_ids delay_pattern group_size input_full_attention input_local_dim "
    "input_local_layers local_attn_dropout local_attn_heads local_dim local_ffn_dim local_layers "
    "local_rotary_base speech_vocab_size speech_zeroemb_idx".split()
)

FAMILY = Family(parse=parse, keys=KEYS, entries=plain_entries, build=build)
