"""Decoding codes to a waveform while they come, with a bounded memory of the past.

Each push decodes the remembered tokens anew and emits the samples whose future is known. Legend: R stages,
L tokens, D width, N samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.errors import ConfigError
from sateen.models.mimo_audio.decoder import Statistics
from sateen.models.mimo_audio.tokenizer import AudioTokenizer

LEFT_CONTEXT = 250  # tokens: 10 s at 25 Hz


class StreamingDecoder:
    """One stream of codes; push them in any portions.

    While the stream is within `left_context` and the norms' statistics are frozen, the samples are those of
    `AudioTokenizer.decode`. Beyond it the causal layers have forgotten the oldest tokens; without frozen
    statistics the norms measure only what is remembered.

    Args:
        tokenizer: whose decoder runs.
        left_context: tokens remembered once they are emitted.
        right_overlap: tokens held back until their future is known; None holds back what the vocoder's
            windows and overlapping transforms look at. The published code holds back 40, one token less,
            so the last 1.5 frames of each of its portions are not final.
        statistics: of the decoder's norms (`AudioDecoder.statistics` of a typical clip); None measures them.

    Source: the published `streaming_decode` (XiaomiMiMo/MiMo-Audio); the overlap's default and the frozen
    statistics are ours.
    """

    def __init__(
        self,
        tokenizer: AudioTokenizer,
        *,
        left_context: int = LEFT_CONTEXT,
        right_overlap: int | None = None,
        statistics: tuple[Statistics, Statistics] | None = None,
    ):
        config = tokenizer.config
        if right_overlap is None:
            right_overlap = -(-tokenizer.decoder.vocoder.look_ahead_frames // config.frames_per_token)
        if not 0 <= right_overlap <= left_context:
            raise ConfigError(
                f"right_overlap {right_overlap} and left_context {left_context} tokens; accepted: an overlap "
                "of 0 or more and a context not below it"
            )
        self.tokenizer = tokenizer
        self.left_context, self.right_overlap = left_context, right_overlap
        self.statistics = statistics
        self._vectors_LD = torch.zeros(0, config.d_model, device=tokenizer.device)
        self._emitted = 0  # of the remembered tokens

    @torch.no_grad()
    def push(self, codes_RL: Tensor, *, is_last: bool = False) -> Tensor:
        """The samples [N] that these codes complete; N is a multiple of samples_per_token, often 0.

        Args:
            codes_RL: the next codes, of any number of leading stages; no tokens is fine.
            is_last: nothing follows: emit all that is left and forget it.

        Raises:
            ShapeError: see `AudioTokenizer.decode`.
        """
        new_LD = self.tokenizer.encoder.quantizer.decode(codes_RL.to(self._vectors_LD.device))
        self._vectors_LD = torch.cat([self._vectors_LD, new_LD])
        total = len(self._vectors_LD)
        final = total if is_last else max(total - self.right_overlap, self._emitted)
        wave_N = new_LD.new_empty(0)
        if final > self._emitted:
            step = self.tokenizer.config.samples_per_token
            whole_N = self.tokenizer.decoder(self._vectors_LD[None], self.statistics)[0]
            wave_N = whole_N[self._emitted * step : final * step]
        forgotten = total if is_last else max(total - self.left_context, 0)
        self._vectors_LD = self._vectors_LD[forgotten:]
        self._emitted = max(final - forgotten, 0)
        return wave_N
