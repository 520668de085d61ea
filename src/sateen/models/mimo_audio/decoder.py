"""The audio decoder: quantised vectors at 25 Hz to coarse mel frames at 100 Hz, then the vocoder.

Legend: B clips, L tokens, T frames, M mel channels, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sateen.models.mimo_audio.tokenizer_config import AudioTokenizerConfig
from sateen.models.mimo_audio.transformer import EPS, Layer, positions
from sateen.models.mimo_audio.vocoder import Vocoder


class Statistics(NamedTuple):
    """Mean and variance of a norm's input, one of each per clip, shape [B, 1, 1]."""

    mean: Tensor
    variance: Tensor


class UpSample(nn.Module):
    """A transposed convolution and a norm over all channels and the whole time of a clip.

    Because of that norm a decoder that is causal in attention still lets later frames change earlier ones.
    With `statistics` of another clip it does not: that is what streams of fixed level use.
    """

    def __init__(self, width: int, out_width: int, kernel: int, stride: int):
        super().__init__()
        self.trim = kernel - stride
        self.conv = nn.ConvTranspose1d(width, out_width, kernel, stride=stride)
        self.norm = nn.GroupNorm(1, out_width)

    def convolve(self, x_BTD: Tensor) -> Tensor:
        """The convolution alone, [B, D, T]."""
        out: Tensor = self.conv(x_BTD.transpose(1, 2))
        return out

    def forward(self, x_BTD: Tensor, statistics: Statistics | None = None) -> Tensor:
        x_BDT = self.convolve(x_BTD)
        if statistics is None:
            x_BDT = self.norm(x_BDT)
        else:
            scaled = (x_BDT - statistics.mean) * torch.rsqrt(statistics.variance + self.norm.eps)
            x_BDT = scaled * self.norm.weight[:, None] + self.norm.bias[:, None]
        # The norm sees the frames that are dropped here, as in the published modules.
        return x_BDT[..., : x_BDT.shape[-1] - self.trim].transpose(1, 2)

    def statistics(self, x_BTD: Tensor) -> Statistics:
        """What the norm measures on this input."""
        x_BDT = self.convolve(x_BTD)
        variance, mean = torch.var_mean(x_BDT, dim=(1, 2), keepdim=True, correction=0)
        return Statistics(mean, variance)


class AudioDecoder(nn.Module):
    """Up-sampling to 50 Hz, causal transformer layers, up-sampling to mel frames, the vocoder.

    Source: MiMo-Audio §2.1.1 and its published modules.
    """

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.config = config
        width = config.d_model
        self.window = config.decoder_attn_window_size
        if config.decoder_causal:
            self.window = (self.window[0], 0)
        self.dconv1 = UpSample(width, width, config.avg_pooler, config.avg_pooler)
        self.layers = nn.ModuleList(
            Layer(width, config.decoder_attention_heads, config.decoder_ffn_dim)
            for _ in range(config.decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(width, eps=EPS)
        self.dconv2 = UpSample(width, config.n_mels, config.decoder_kernel_size, config.decoder_stride_size)
        self.vocoder = Vocoder(config)

    def forward(self, vectors_BLD: Tensor, statistics: tuple[Statistics, Statistics] | None = None) -> Tensor:
        """Waveforms [B, L * samples_per_token] of clips of equal length, in float32.

        Args:
            statistics: of the two norms; None measures them on these clips.
        """
        wave_BN: Tensor = self.vocoder(self.coarse_mel(vectors_BLD, statistics))
        return wave_BN

    def coarse_mel(
        self, vectors_BLD: Tensor, statistics: tuple[Statistics, Statistics] | None = None
    ) -> Tensor:
        """The vocoder's input [B, L * frames_per_token, M]."""
        first, second = statistics or (None, None)
        hidden_BTD = self._transform(self.dconv1(vectors_BLD.to(self.dconv1.conv.weight.dtype), first))
        mel_BTM: Tensor = self.dconv2(hidden_BTD, second)
        return mel_BTM

    def statistics(self, vectors_BLD: Tensor) -> tuple[Statistics, Statistics]:
        """What both norms measure on a clip; hand them to `forward` to freeze them."""
        vectors_BLD = vectors_BLD.to(self.dconv1.conv.weight.dtype)
        hidden_BTD = self._transform(self.dconv1(vectors_BLD))
        return self.dconv1.statistics(vectors_BLD), self.dconv2.statistics(hidden_BTD)

    def _transform(self, x_BTD: Tensor) -> Tensor:
        head_dim = self.config.d_model // self.config.decoder_attention_heads
        tables = positions(x_BTD.shape[1], self.config.rope_theta, head_dim, x_BTD.device)
        for layer in self.layers:
            x_BTD = layer(x_BTD, tables, self.window)
        x_BTD = self.layer_norm(x_BTD)
        return x_BTD
