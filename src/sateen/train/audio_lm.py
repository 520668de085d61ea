"""The `audio_lm` stage: an audio language model on codes of the audio tokenizer that came before it.

The model's directory carries the audio tokenizer in `audio_tokenizer/`, so that it can listen and speak on
its own. Legend: R channels, T frames.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sateen.checkpoint import hf
from sateen.checkpoint.audio import SUBFOLDER, load_audio_tokenizer, resolve_audio_tokenizer, write_files
from sateen.checkpoint.load import load
from sateen.config import AudioLMStageConfig, StageContext
from sateen.data.tokenizer import check_vocab
from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.mimo_audio.layout import AudioBatch
from sateen.models.mimo_audio.lm import AudioLM, LossWeights
from sateen.models.mimo_audio.prompts import Prompts
from sateen.models.mimo_audio.tokenizer import AudioTokenizer
from sateen.models.mimo_audio_lm import AudioTokens
from sateen.models.registry import preset
from sateen.train.activations import checkpoint_activations
from sateen.train.audio_documents import DocumentLoader, SpokenClip, encode_clips
from sateen.train.code_losses import code_nats
from sateen.train.loop import BatchSource, is_finished, stage_seed, train_stage
from sateen.train.objective import LossParts, Objective
from sateen.train.prepare import run_tokenizer
from sateen.train.speech_data import prepare_waves

HELDOUT_CLIPS = 16


def audio_lm(context: StageContext) -> None:
    """Trains an audio language model (MiMo-Audio, arXiv 2512.23808 §3) on the run's speech.

    Raises:
        ConfigError: no audio tokenizer was trained before, or its codebooks are not the model's.
    """
    if not is_finished(context):
        train_stage(context, AudioLMSubject(context))


class AudioLMSubject:
    """A `Subject` of text tokens and patches of codes."""

    def __init__(self, context: StageContext):
        assert isinstance(context.stage, AudioLMStageConfig)
        self.context, self.stage = context, context.stage
        self.tokenizer = run_tokenizer(context)
        self.codec: AudioTokenizer | None = None

    def start(self, origin: Path | None) -> AudioLM:
        if origin is None:
            raise ConfigError(
                "the audio_lm stage needs an audio tokenizer; put an audio_tokenizer stage before it"
            )
        folder = resolve_audio_tokenizer(origin)
        self._listen_with(folder)
        return self._ready(self._new() if folder == origin else self._load(origin))

    def resume(self, folder: Path) -> AudioLM:
        self._listen_with(folder / SUBFOLDER)
        return self._ready(self._load(folder))

    def _ready(self, model: AudioLM) -> AudioLM:
        if self.stage.activation_checkpointing:
            checkpoint_activations(model, getattr(torch, self.context.config.dtype))
        return model

    def _listen_with(self, folder: Path) -> None:
        self.codec = load_audio_tokenizer(folder, device=self.context.config.device)

    def _load(self, folder: Path) -> AudioLM:
        model = load(folder, dtype=torch.float32, device=self.context.config.device)
        if not isinstance(model, AudioLM):
            raise ConfigError(f"{folder} is no audio language model; the audio_lm stage trains nothing else")
        return model

    def _new(self) -> AudioLM:
        source = self.context.config.model
        if source.preset is not None:
            raw, origin = preset(source.preset), f"preset {source.preset}"
        else:
            assert source.config is not None
            raw, origin = json.loads(source.config.read_text(encoding="utf-8")), str(source.config)
        special = {
            "bos_token_id": self.tokenizer.bos_id,
            "eos_token_id": self.tokenizer.eos_id,
            "audio_token_ids": AudioTokens.of(self.tokenizer.token_id).to_dict(),
        }
        config = ModelConfig.from_hf({**raw, **special, **source.overrides}, origin=origin)
        check_vocab(self.tokenizer, config.vocab_size)
        model = Decoder.build(config)
        if not isinstance(model, AudioLM):
            raise ConfigError(f"{origin} is no audio language model; the audio_lm stage trains nothing else")
        return model.to(self.context.config.device).init_weights(self.context.config.seed)

    def objective(self, model: AudioLM) -> Objective:
        return PatchObjective(self.stage.patches_per_batch or None)

    def batches(self, model: AudioLM) -> BatchSource:
        assert self.codec is not None
        channels, sizes = model.spec.channels, self.codec.config.codebook_size
        if model.spec.empty_ids != sizes[:channels]:
            raise ConfigError(
                f"the model's channels have {model.spec.empty_ids} codes, the audio tokenizer's first "
                f"codebooks {sizes[:channels]}; speech_vocab_size and speech_zeroemb_idx must say the same"
            )
        sources = []
        self.heldout_codes = []
        for source in prepare_waves(self.context, self.codec.config.sampling_rate):
            folder = self.context.folder / "data"
            self.context.progress.note(f"encoding {source.name}")
            codes = encode_clips(folder / f"{source.name}-codes.safetensors", source.train, self.codec)
            clips = [
                SpokenClip(clip.text, code_RT[:channels].T)
                for clip, code_RT in zip(source.train.clips, codes, strict=True)
            ]
            sources.append((clips, source.weight))
            if source.heldout is not None:
                file = folder / f"{source.name}-codes-heldout.safetensors"
                kept_back = encode_clips(file, source.heldout, self.codec)
                self.heldout_codes += [code_RT[:channels].T for code_RT in kept_back]
        prompts = Prompts(
            model.spec,
            self.tokenizer.encode,
            self.tokenizer.token_id,
            text_chunk=self.stage.text_chunk,
            patch_chunk=self.stage.patch_chunk,
        )
        return DocumentLoader(
            sources,
            tasks={str(task): weight for task, weight in self.stage.tasks.items()},
            prompts=prompts,
            positions=self.stage.tokens_per_batch,
            seq_len=self.stage.seq_len,
            seed=stage_seed(self.context),
        )

    def write(self, model: AudioLM, folder: Path) -> None:
        assert self.codec is not None
        hf.write_files(model, folder, carry_from=self.context.folder / "tokenizer")
        (folder / SUBFOLDER).mkdir()
        write_files(self.codec, folder / SUBFOLDER)

    def describe(self, values: dict[str, Any], batches: Sequence[AudioBatch]) -> dict[str, float]:
        """What the patch decoder pays for a frame, all channels together."""
        codes = [value for name, value in values.items() if name.startswith("loss_code_")]
        return {"code_nats_per_frame": sum(codes)} if codes else {}

    def heldout(self, model: AudioLM) -> dict[str, float]:
        """The same on held-out speech."""
        if not self.heldout_codes:
            return {}
        every = -(-len(self.heldout_codes) // HELDOUT_CLIPS)
        return {"heldout_code_nats_per_frame": float(code_nats(model, self.heldout_codes[::every]).sum())}


class PatchObjective:
    """The published loss weights over text and codes; it draws with torch's own generator, which is saved.

    Args:
        max_patches: see `AudioLM.loss_parts`.
    """

    def __init__(self, max_patches: int | None):
        self.max_patches = max_patches

    def begin_step(self, batches: Sequence[AudioBatch]) -> None:
        """Nothing: a step is one batch."""

    def loss(self, model: AudioLM, batch: AudioBatch) -> LossParts:
        """The batch's loss."""
        weights = LossWeights()
        if len(weights.channels) != model.spec.channels:
            # Fewer channels than the release: the weights of the first ones.
            weights = LossWeights(channels=weights.channels[: model.spec.channels])
        parts = model.loss_parts(batch, weights, max_patches=self.max_patches)
        total = parts.pop("total")
        return LossParts(total, parts)
