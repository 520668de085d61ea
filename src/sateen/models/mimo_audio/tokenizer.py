"""`AudioTokenizer`: waveforms to codes and back. Parameters carry the published checkpoint's names.

Legend: B clips, N samples, T mel frames, M mel channels, L tokens, D width, R residual stages.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sateen.errors import ShapeError
from sateen.models.mimo_audio.decoder import AudioDecoder
from sateen.models.mimo_audio.encoder import AudioEncoder
from sateen.models.mimo_audio.quantizer import Quantized
from sateen.models.mimo_audio.tokenizer_config import AudioTokenizerConfig
from sateen.models.mimo_audio.transformer import Layer
from sateen.nn.mel import log_mel


@dataclass(frozen=True)
class Reconstruction:
    """What a training step needs of a forward pass.

    Attributes:
        wave_BN: the decoded clips, as long as the input, float32.
        codes_BRT: int64, R stages and T tokens.
        quantized_BTD: quantised vectors; gradients pass straight through to `hidden_BTD`.
        commitment: scalar, the mean squared distance to the chosen entries, averaged over stages.
        hidden_BTD: the encoder's output before quantisation; `update_codebooks` takes it.
    """

    wave_BN: Tensor
    codes_BRT: Tensor
    quantized_BTD: Tensor
    commitment: Tensor
    hidden_BTD: Tensor


class AudioTokenizer(nn.Module):
    """Encoder, residual quantizer, decoder and vocoder of MiMo-Audio.

    Attributes:
        config: its config; `config.to_hf()` is the `config.json` that `save` writes.

    Source: MiMo-Audio, arXiv 2512.23808 §2.1, and its published modules (XiaomiMiMo/MiMo-Audio).
    """

    saver: ClassVar[Callable[[AudioTokenizer, Path], None] | None] = None  # set by sateen.checkpoint.audio
    loader: ClassVar[Callable[[Path], AudioTokenizer] | None] = None

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = AudioEncoder(config)
        self.decoder = AudioDecoder(config)

    @property
    def device(self) -> torch.device:
        return self.encoder.conv1.weight.device

    @torch.no_grad()
    def mel(self, wave_N: Tensor) -> Tensor:
        """Log-mel frames [N // hop_length + 1, M] of one clip at `config.sampling_rate`, in float32."""
        return log_mel(_one_clip(wave_N)[None], self.config.mel)[0]

    @torch.no_grad()
    def encode(
        self, wave_N: Tensor, *, num_quantizers: int | None = None, reference_batching: bool = False
    ) -> Tensor:
        """Codes [R, L], int64, of one clip of any length; pieces of 60 s are encoded independently.

        Args:
            wave_N: samples at `config.sampling_rate`, nominally within [-1, 1].
            num_quantizers: leading stages R; all when None.
            reference_batching: encode the shorter last piece in one batch with the others, which changes its
                last code as in the published code (see `AudioEncoder.forward`).

        Raises:
            ShapeError: not one clip, or not longer than half a Fourier transform.
        """
        hidden_LD = self.hidden(wave_N, reference_batching=reference_batching)
        return self.encoder.quantizer.encode(hidden_LD, num_quantizers)

    @torch.no_grad()
    def hidden(self, wave_N: Tensor, *, reference_batching: bool = False) -> Tensor:
        """The encoder's output [L, D] before quantisation; see `encode`."""
        mel_TM = self.mel(wave_N.to(self.device))
        pieces = mel_TM.split(self.config.segment_frames)
        if reference_batching and len(pieces) > 1:
            lengths_B = torch.tensor([len(piece) for piece in pieces], device=self.device)
            mel_BTM = nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
            hidden_BLD = self.encoder(mel_BTM, lengths_B, reference_batching=True)
            tokens = [self.config.num_tokens(len(piece)) for piece in pieces]
            return torch.cat([hidden_BLD[b, :count] for b, count in enumerate(tokens)])
        return torch.cat([self.encoder(piece[None])[0] for piece in pieces])

    @torch.no_grad()
    def decode(self, codes_RT: Tensor) -> Tensor:
        """The waveform [L * samples_per_token] of codes [R, L]; pieces of 60 s are decoded independently.

        Args:
            codes_RT: codes of the leading stages, of any number of them.

        Raises:
            ShapeError: not [R, L], more stages than codebooks, or a code outside its codebook.
        """
        vectors_LD = self.encoder.quantizer.decode(codes_RT.to(self.device))
        pieces = vectors_LD.split(self.config.segment_tokens)
        return torch.cat(
            [self.decoder(piece[None])[0] for piece in pieces if len(piece)] or [vectors_LD.new_empty(0)]
        )

    def reconstruct(self, wave_BN: Tensor, *, num_quantizers: int | None = None) -> Reconstruction:
        """Encodes, quantises and decodes clips of equal length, at most 60 s, for training; differentiable.

        Args:
            wave_BN: clips at `config.sampling_rate`.
            num_quantizers: stages to use this time, all when None; a random number of them per step keeps
                decoding from few codebooks in distribution.
        """
        hidden_BTD = self.encoder(log_mel(wave_BN, self.config.mel))
        coded: Quantized = self.encoder.quantizer(hidden_BTD, num_quantizers)
        wave = self.decoder(coded.vectors_BLD)[:, : wave_BN.shape[1]]
        return Reconstruction(wave, coded.codes_BRL, coded.vectors_BLD, coded.commitment, hidden_BTD)

    def update_codebooks(self, hidden_BTD: Tensor, generator: torch.Generator) -> list[int]:
        """Moves the codebooks by one batch and returns how many entries were replaced in each stage.

        Codebooks that were never set get a k-means over the batch instead; call this once before the first
        `reconstruct`, with more tokens than a codebook has entries. Afterwards call it once per step with the
        `Reconstruction`'s hidden states. All stages move, however many the step used.

        Args:
            hidden_BTD: the encoder's output; [B, T, D] or [T, D].
            generator: all randomness comes from it.
        """
        hidden_PD = hidden_BTD.detach().reshape(-1, self.config.d_model)
        return self.encoder.quantizer.update(hidden_PD, self.config.threshold_ema_dead_code, generator)

    @torch.no_grad()
    def init_weights(self, seed: int) -> AudioTokenizer:
        """Fresh weights: normal, standard deviation 1 / sqrt(fan in); norms one, biases zero (source: ours).

        What a layer adds is scaled by 1 / sqrt(2 x layers), and the first convolution's filters have mean
        zero: the level that all mel channels share would otherwise make the tokens of a fresh encoder alike.
        Codebooks are drawn too, so that a fresh tokenizer codes, but count as never set: the first
        `update_codebooks` replaces them.
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
                fan_in = module.weight[0].numel()
                if isinstance(module, nn.ConvTranspose1d):
                    # An output frame gathers kernel / stride taps of every input channel.
                    fan_in = module.in_channels * module.kernel_size[0] // module.stride[0]
                module.weight.normal_(0, 1 / math.sqrt(fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.weight.fill_(1)
                module.bias.zero_()
        for part in (self.encoder, self.decoder, self.decoder.vocoder):
            for layer in cast(Sequence[Layer], part.layers):
                for linear in (layer.self_attn.out_proj, layer.fc2):
                    linear.weight.mul_(1 / math.sqrt(2 * len(part.layers)))
        self.encoder.conv1.weight.sub_(self.encoder.conv1.weight.mean((1, 2), keepdim=True))
        for stage, codebook in enumerate(self.encoder.quantizer.codebooks):
            # The norm before the quantizer leaves unit variance; each stage halves what is left.
            codebook.embed.normal_(0, 0.5**stage, generator=generator)
            codebook.embed_avg.copy_(codebook.embed)
            codebook.cluster_size.fill_(1)
            codebook.inited.zero_()
        window = self.decoder.vocoder.head.istft.window
        window.copy_(torch.hann_window(len(window), device=window.device))
        return self

    def fingerprint(self) -> str:
        """A hash of the config and the codebooks: codes with the same one mean the same vectors.

        A decoder that was trained further on fixed codebooks keeps it, since it still reads the same codes.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_hf(), sort_keys=True).encode())
        for codebook in self.encoder.quantizer.codebooks:
            digest.update(codebook.embed.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into `folder`, atomically."""
        assert AudioTokenizer.saver is not None, "import sateen.checkpoint.audio first"
        AudioTokenizer.saver(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> AudioTokenizer:
        """The tokenizer stored in `folder`, in evaluation mode and float32.

        Raises:
            CheckpointError: no tokenizer is there, tensors are missing or unknown, or shapes differ.
        """
        assert AudioTokenizer.loader is not None, "import sateen.checkpoint.audio first"
        return AudioTokenizer.loader(Path(folder))


def _one_clip(wave_N: Tensor) -> Tensor:
    if wave_N.ndim != 1:
        raise ShapeError(f"a waveform of shape {tuple(wave_N.shape)}; accepted: [samples], one channel")
    return wave_N
