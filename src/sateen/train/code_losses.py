"""What an audio language model pays for the codes of speech it has not seen, channel by channel.

The stage measures it while it trains; `eval` sets it beside predictors without a model. Legend: T frames, R
channels, P patches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from sateen.models.mimo_audio.layout import audio_input, pack
from sateen.models.mimo_audio.lm import AudioLM
from sateen.nn.attention import Sequences


@torch.no_grad()
def code_nats(model: AudioLM, clips: Iterable[Tensor]) -> Tensor:
    """Mean nats per code of each channel [R], float64, with all codes before it given (teacher forcing).

    Every code is predicted, those of a clip's first patch too; frames repeated to fill the last patch are not
    counted.

    Args:
        model: evaluated in place; its mode is restored.
        clips: codes [T, R] of each clip, undelayed.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(model.spec.channels, dtype=torch.float64)
    count = 0
    for codes_TR in clips:
        batch = pack(model.spec, [audio_input(model.spec, codes_TR).learnt(model.spec)]).to(model.device)
        hidden_LD = model.hidden(
            batch.text_ids_L, batch.codes_LGR, Sequences(batch.cu_seqlens, batch.position_ids)
        )
        codes_PGR = batch.codes_LGR[batch.patches_P]
        logits = model.patch_logits(hidden_LD[batch.patches_P - 1], codes_PGR)
        T = len(codes_TR)
        for r, logits_PGV in enumerate(logits):
            nats = F.cross_entropy(
                logits_PGV.flatten(0, 1)[:T].float(), codes_PGR[:, :, r].flatten()[:T], reduction="sum"
            )
            sums[r] += float(nats)
        count += T
    model.train(was_training)
    return sums / max(count, 1)
