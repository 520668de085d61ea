"""The `audio_tokenizer` stage: an audio tokenizer from nothing, by reconstruction and reading.

Codebooks are buffers that move by running averages inside each step; they are saved with the model, so a
resumed stage repeats an unbroken one. Legend: B crops, N samples, L tokens, D width, R codebooks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sateen.checkpoint.audio import load_audio_tokenizer, write_files
from sateen.config import AudioTokenizerStageConfig, StageContext
from sateen.data.crops import CropLoader, WaveBatch
from sateen.errors import ConfigError
from sateen.models.mimo_audio.tokenizer import AudioTokenizer
from sateen.models.mimo_audio.tokenizer_config import AudioTokenizerConfig, audio_tokenizer_preset
from sateen.nn.mel import log_mel
from sateen.train.loop import BatchSource, is_finished, stage_seed, train_stage
from sateen.train.mel_loss import mel_scales, multi_scale_mel_loss
from sateen.train.objective import LossParts, Objective
from sateen.train.speech_data import prepare_waves
from sateen.train.text_reader import TextReader

READER = "text_reader"
KMEANS_TOKENS = 4096
"""Tokens that the codebooks' first entries are means of (source: ours; the report uses the first batch)."""
HELDOUT_CROPS = 16


def audio_tokenizer(context: StageContext) -> None:
    """Trains an audio tokenizer on the run's speech (MiMo-Audio, arXiv 2512.23808 §2.1.2, stage 1).

    Raises:
        ConfigError: the sources are no speech, or another stage's model is to be continued.
    """
    if not is_finished(context):
        train_stage(context, AudioTokenizerSubject(context))


class ReadTokenizer(nn.Module):
    """A tokenizer and the reader that is trained with it.

    Attributes:
        tokenizer: what the stage makes.
        reader: None where the transcript is not read.
    """

    def __init__(self, tokenizer: AudioTokenizer, reader: TextReader | None):
        super().__init__()
        self.tokenizer, self.reader = tokenizer, reader


class AudioTokenizerSubject:
    """A `Subject` of waveforms."""

    def __init__(self, context: StageContext):
        assert isinstance(context.stage, AudioTokenizerStageConfig)
        self.context, self.stage = context, context.stage
        self.config = tokenizer_config(self.stage)
        self.data = prepare_waves(context, self.config.sampling_rate)

    def start(self, origin: Path | None) -> ReadTokenizer:
        if origin is not None:
            raise ConfigError(
                f"the audio_tokenizer stage starts from nothing and cannot continue {origin}; put it first"
            )
        seed = self.context.config.seed
        model = self._assemble(AudioTokenizer(self.config).init_weights(seed))
        if model.reader is not None:
            model.reader.init_weights(seed)
        return model.to(self.context.config.device)

    def resume(self, folder: Path) -> ReadTokenizer:
        model = self._assemble(load_audio_tokenizer(folder))
        if model.reader is not None:
            model.reader.load_state_dict(load_file(folder / READER / "model.safetensors"))
        return model.to(self.context.config.device)

    def _assemble(self, tokenizer: AudioTokenizer) -> ReadTokenizer:
        reads = self.stage.text_weight > 0
        return ReadTokenizer(
            tokenizer, TextReader(self.config.d_model, self.stage.text_layers) if reads else None
        )

    def objective(self, model: ReadTokenizer) -> Objective:
        def first_waves() -> Tensor:
            # Of another seed than the batches: they are drawn before the step, not instead of one.
            crops = -(-KMEANS_TOKENS // self.stage.seq_len)
            return next(self._loader(crops, stage_seed(self.context) + 1)).wave_BN

        return CodecObjective(self.stage, self.config, first_waves)

    def batches(self, model: ReadTokenizer) -> BatchSource:
        crops = self.stage.tokens_per_batch // self.stage.seq_len
        return self._loader(crops, stage_seed(self.context))

    def _loader(self, crops: int, seed: int) -> CropLoader:
        return CropLoader(
            [(source.train, source.weight) for source in self.data],
            crops=crops,
            frames=self.stage.seq_len,
            samples_per_frame=self.config.samples_per_token,
            seed=seed,
        )

    def write(self, model: ReadTokenizer, folder: Path) -> None:
        write_files(model.tokenizer, folder)
        if model.reader is not None:
            (folder / READER).mkdir()
            tensors = {k: v.detach().cpu().contiguous() for k, v in model.reader.state_dict().items()}
            save_file(tensors, folder / READER / "model.safetensors")

    def describe(self, values: dict[str, Any], batches: Sequence[WaveBatch]) -> dict[str, float]:
        """Nothing: the losses say it."""
        return {}

    @torch.no_grad()
    def heldout(self, model: ReadTokenizer) -> dict[str, float]:
        """The reconstruction loss of the middle of some held-out clips."""
        scales = mel_scales(self.config.sampling_rate, self.stage.num_mels, self.stage.mel_windows)
        length = self.stage.seq_len * self.config.samples_per_token
        files = [source.heldout for source in self.data if source.heldout is not None]
        crops = []
        for file in files:
            every = -(-len(file.clips) * len(files) // HELDOUT_CROPS)
            for i in range(0, len(file.clips), every):
                spare = int(file.offsets[i + 1] - file.offsets[i]) - length
                crops.append(file.piece(i, max(spare, 0) // 2, length))
        if not crops:
            return {}
        wave_BN = torch.stack(crops).to(self.context.config.device)
        made = model.tokenizer.reconstruct(wave_BN)
        loss = multi_scale_mel_loss(made.wave_BN, wave_BN, scales)
        return {"heldout_loss_reconstruction": float(loss)}


class CodecObjective:
    """Reconstruction, commitment and reading; it moves the codebooks too, once per batch.

    Args:
        stage: the weights.
        config: of the tokenizer.
        first_waves: gives the crops whose vectors the codebooks begin with.
    """

    def __init__(
        self,
        stage: AudioTokenizerStageConfig,
        config: AudioTokenizerConfig,
        first_waves: Callable[[], Tensor],
    ):
        self.stage, self.config, self.first_waves = stage, config, first_waves
        self.scales = mel_scales(config.sampling_rate, stage.num_mels, stage.mel_windows)

    def begin_step(self, batches: Sequence[WaveBatch]) -> None:
        """Nothing: a step is one batch."""

    def loss(self, model: ReadTokenizer, batch: WaveBatch) -> LossParts:
        """The batch's loss; all random choices come from torch's own generator, which checkpoints keep."""
        stage, tokenizer, wave_BN = self.stage, model.tokenizer, batch.wave_BN
        if batch.first_frame < stage.unquantized_tokens:
            # The encoder moves too fast at first for running averages to follow it.
            vectors_BLD = tokenizer.encoder(log_mel(wave_BN, self.config.mel))
            wave = tokenizer.decoder(vectors_BLD)[:, : wave_BN.shape[1]]
            commitment = wave.new_zeros(())
        else:
            if not tokenizer.encoder.quantizer.is_initialized:
                with torch.no_grad():
                    first_BLD = tokenizer.encoder(
                        log_mel(self.first_waves().to(wave_BN.device), self.config.mel)
                    )
                tokenizer.update_codebooks(first_BLD, torch.default_generator)
            made = tokenizer.reconstruct(wave_BN, num_quantizers=self._num_quantizers())
            tokenizer.update_codebooks(made.hidden_BTD, torch.default_generator)
            vectors_BLD, wave, commitment = made.quantized_BTD, made.wave_BN, made.commitment
        reconstruction = multi_scale_mel_loss(wave, wave_BN, self.scales)
        total = stage.reconstruction_weight * reconstruction + stage.commitment_weight * commitment
        parts = {"reconstruction": reconstruction.detach(), "commitment": commitment.detach()}
        if model.reader is not None:
            text = model.reader.loss(vectors_BLD, batch.texts)
            total = total + stage.text_weight * text
            parts["text"] = text.detach()
        return LossParts(total, parts)

    def _num_quantizers(self) -> int:
        """All codebooks, or with the stage's probability the first few: decoding from few stays trained."""
        books = self.config.num_quantizers
        if float(torch.rand(())) >= self.stage.stage_dropout:
            return books
        return int(torch.randint(1, books + 1, ()))


def tokenizer_config(stage: AudioTokenizerStageConfig) -> AudioTokenizerConfig:
    """The tokenizer's shape.

    Raises:
        ConfigError: an unknown preset or a config that cannot be read.
    """
    source = stage.tokenizer
    if source.preset is not None:
        raw, origin = audio_tokenizer_preset(source.preset).to_hf(), f"preset {source.preset}"
    else:
        assert source.config is not None
        raw, origin = json.loads(source.config.read_text(encoding="utf-8")), str(source.config)
    return AudioTokenizerConfig.from_hf({**raw, **source.overrides}, origin=origin)
