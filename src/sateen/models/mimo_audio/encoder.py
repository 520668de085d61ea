"""The audio encoder: mel frames at 100 Hz to hidden states at 25 Hz, one segment of at most 60 s at a time.

Legend: B clips, T mel frames, L tokens, M mel channels, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sateen.models.mimo_audio.quantizer import ResidualQuantizer
from sateen.models.mimo_audio.tokenizer_config import AudioTokenizerConfig
from sateen.models.mimo_audio.transformer import EPS, Layer, positions


class AudioEncoder(nn.Module):
    """Two convolutions, bidirectional transformer layers, a convolution to the token rate, the quantizer.

    Source: MiMo-Audio, arXiv 2512.23808 §2.1.1, and its published modules. The output of layer
    `encoder_skip_layer_id` is added to that of the last layer before the final norm.
    """

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        width = config.d_model
        self.config = config
        self.window = config.encoder_attn_window_size
        if config.encoder_causal:
            self.window = (self.window[0], 0)
        self.conv1 = nn.Conv1d(config.n_mels, width, config.kernel_size, padding=1)
        self.conv2 = nn.Conv1d(width, width, config.kernel_size, stride=config.stride_size, padding=1)
        self.layers = nn.ModuleList(
            Layer(width, config.encoder_attention_heads, config.encoder_ffn_dim)
            for _ in range(config.encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(width, eps=EPS)
        pool = config.avg_pooler
        self.down_sample_layer = nn.Sequential(
            nn.Conv1d(width, width, pool, stride=pool, bias=False), nn.GELU()
        )
        self.down_sample_norm = nn.LayerNorm(width, eps=EPS)
        self.quantizer = ResidualQuantizer(config.codebook_size, width)

    def forward(
        self, mel_BTM: Tensor, lengths_B: Tensor | None = None, *, reference_batching: bool = False
    ) -> Tensor:
        """Hidden states [B, L, D] before quantisation, L = num_tokens(T).

        Args:
            mel_BTM: log-mel frames; behind a shorter clip's end they must be zero.
            lengths_B: frames of each clip; None when all have T. Tokens behind a clip's end have no meaning.
            reference_batching: let a shorter clip's last token depend on the batch, as in the published
                code: the second convolution sees what the first made of the padding, and the last one a
                repeated frame, where a clip that is encoded alone has zeros.
        """
        stride, pool = self.config.stride_size, self.config.avg_pooler
        x = F.gelu(self.conv1(mel_BTM.to(self.conv1.weight.dtype).transpose(1, 2)))
        if lengths_B is not None and not reference_batching:
            x = x * _real(lengths_B, x.shape[2])[:, None]
        x_BTD = F.gelu(self.conv2(x)).transpose(1, 2)

        T = x_BTD.shape[1]
        keys_BT = None
        if lengths_B is not None:
            lengths_B = (lengths_B + stride - 1) // stride
            keys_BT = _real(lengths_B, T)
        head_dim = self.config.d_model // self.config.encoder_attention_heads
        tables = positions(T, self.config.rope_theta, head_dim, x_BTD.device)
        skipped = x_BTD
        for number, layer in enumerate(self.layers, start=1):
            x_BTD = layer(x_BTD, tables, self.window, keys_BT)
            if number == self.config.encoder_skip_layer_id:
                skipped = x_BTD
        x_BTD = self.layer_norm(x_BTD + skipped)

        if lengths_B is not None and reference_batching:
            here = torch.arange(T, device=x_BTD.device).minimum(lengths_B[:, None] - 1)
            x_BTD = x_BTD.gather(1, here[..., None].expand_as(x_BTD))
        elif keys_BT is not None:
            x_BTD = x_BTD * keys_BT[..., None]
        x_BTD = F.pad(x_BTD, (0, 0, 0, -T % pool))
        hidden_BLD: Tensor = self.down_sample_norm(
            self.down_sample_layer(x_BTD.transpose(1, 2)).transpose(1, 2)
        )
        return hidden_BLD


def _real(lengths_B: Tensor, T: int) -> Tensor:
    return torch.arange(T, device=lengths_B.device)[None] < lengths_B[:, None]
