"""The vocoder: coarse mel frames to a waveform, through windowed attention and an inverse Fourier transform.

Legend: B clips, T mel frames, M mel channels, D width, K frequency bins, N samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sateen.models.mimo_audio.tokenizer_config import AudioTokenizerConfig
from sateen.models.mimo_audio.transformer import EPS, Layer, positions

MAX_MAGNITUDE = 100.0


class Vocoder(nn.Module):
    """A linear map, transformer layers that see [left, right] frames, and the spectrum they predict.

    Source: MiMo-Audio §2.1.1 and its published modules, a Vocos (arXiv 2306.00814) with a transformer inside.
    """

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.config = config
        width = config.vocoder_dim
        self.embeddings = nn.Linear(config.n_mels, width, bias=False)
        self.layers = nn.ModuleList(
            Layer(width, config.vocoder_attention_heads, config.vocoder_intermediate_dim)
            for _ in range(config.vocoder_num_layers)
        )
        self.layer_norm = nn.LayerNorm(width, eps=EPS)
        self.head = SpectrumHead(width, config.nfft, config.hop_length)

    @property
    def look_ahead_frames(self) -> int:
        """Frames behind the end of a sample's own frame that the sample depends on.

        The layers' windows add up; then the samples near a frame's end overlap with the next frames' windows.
        """
        overlap = -(-(self.config.nfft - self.config.hop_length) // (2 * self.config.hop_length))
        return self.config.vocoder_num_layers * self.config.vocoder_attn_window_size[1] + overlap

    def forward(self, mel_BTM: Tensor) -> Tensor:
        """Waveforms [B, T * hop_length], in float32."""
        x_BTD = self.embeddings(mel_BTM)
        head_dim = self.config.vocoder_dim // self.config.vocoder_attention_heads
        tables = positions(x_BTD.shape[1], self.config.rope_theta, head_dim, x_BTD.device)
        for layer in self.layers:
            x_BTD = layer(x_BTD, tables, self.config.vocoder_attn_window_size)
        wave_BN: Tensor = self.head(self.layer_norm(x_BTD))
        return wave_BN


class SpectrumHead(nn.Module):
    """Log-magnitudes and phase angles of each frame's spectrum, then its inverse transform."""

    def __init__(self, width: int, n_fft: int, hop_length: int):
        super().__init__()
        self.out = nn.Linear(width, n_fft + 2)
        self.istft = InverseSTFT(n_fft, hop_length)

    def forward(self, x_BTD: Tensor) -> Tensor:
        log_magnitude, phase = self.out(x_BTD).float().chunk(2, dim=-1)
        magnitude = log_magnitude.exp().clamp_max(MAX_MAGNITUDE)
        wave_BN: Tensor = self.istft(torch.complex(magnitude * phase.cos(), magnitude * phase.sin()))
        return wave_BN


class InverseSTFT(nn.Module):
    """Overlap-add of windowed inverse transforms, "same" padding: exactly hop_length samples per frame."""

    window: Tensor

    def __init__(self, n_fft: int, hop_length: int):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft))

    def forward(self, spectrum_BTK: Tensor) -> Tensor:
        frames_BTN = torch.fft.irfft(spectrum_BTK, self.n_fft) * self.window
        T = frames_BTN.shape[1]
        weights = self.window.square().expand(1, T, -1)
        trim = (self.n_fft - self.hop_length) // 2
        end = trim + T * self.hop_length
        return (self._add_up(frames_BTN) / self._add_up(weights).clamp_min(1e-11))[:, trim:end]

    def _add_up(self, frames_BTN: Tensor) -> Tensor:
        length = (frames_BTN.shape[1] - 1) * self.hop_length + self.n_fft
        added = F.fold(
            frames_BTN.transpose(1, 2), (1, length), kernel_size=(1, self.n_fft), stride=(1, self.hop_length)
        )
        return added[:, 0, 0]
