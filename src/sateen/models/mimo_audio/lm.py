"""MiMo-Audio's language model: a text decoder that also reads and writes patches of audio codes.

A patch encoder turns the codes of a position into one embedding; the trunk is a `Decoder`'s; behind it the
output matrix gives text logits and, where the text is `<|empty|>`, a patch decoder writes the next position's
codes from the hidden state in G + max(delay) steps. Text alone runs through `Decoder`'s own methods. Shape
letters: L positions (packed over sequences), D width, P patches, G frames of a patch, R channels, S steps of
the patch decoder, E width of the small transformers, V codes of a channel.
Source: MiMo-Audio, arXiv 2512.23808 §2.2, and its published code (modeling_mimo_audio.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sateen.errors import ShapeError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Cache, Decoder
from sateen.models.mimo_audio.layout import IGNORE, AudioBatch, delayed, undelayed
from sateen.models.mimo_audio.patch import PatchTransformer, StepCache
from sateen.models.mimo_audio_lm import AudioSpec
from sateen.nn.attention import Sequences


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses (arXiv 2512.23808 §3.2 and Table 3; the division by their sum is the code's).

    Attributes:
        text: of the text loss.
        channels: of the code loss of each channel; all 0 trains the text alone (stage 1).
        empty_text: of a target `<|empty|>` inside the text loss; audio positions outnumber text.
    """

    text: float = 100.0
    channels: tuple[float, ...] = (12.0, 8.0, 6.0, 4.0, 2.0, 2.0, 1.0, 1.0)
    empty_text: float = 0.01


class AudioLM(Decoder):
    """A `Decoder` with the audio side of MiMo-Audio.

    Attributes:
        spec: the audio side's shape and special tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.spec = spec = AudioSpec.from_hf(config.raw)
        D, eps = config.hidden_size, config.rms_norm_eps
        # The checkpoint's names. The embeddings serve the patch encoder and the patch decoder.
        self.speech_embeddings = nn.ModuleList(
            nn.Embedding(size, spec.encoder_dim, padding_idx=empty)
            for size, empty in zip(spec.vocab_sizes, spec.empty_ids, strict=True)
        )
        self.input_local_transformer = PatchTransformer(
            spec.encoder_dim, spec.encoder_layers, eps, is_bidirectional=spec.is_bidirectional
        )
        self.speech_group_downcast = nn.Linear(spec.group_size * spec.encoder_dim, D, bias=False)
        self.hidden_states_downcast = nn.Linear(D, spec.decoder_dim, bias=False)
        self.speech_embeddings_to_local = (
            nn.Linear(spec.encoder_dim, spec.decoder_dim, bias=False)
            if spec.encoder_dim != spec.decoder_dim
            else None
        )
        self.local_transformer = PatchTransformer(
            spec.decoder_dim, spec.decoder_layers, eps, is_bidirectional=False
        )
        self.local_transformer_lm_heads = nn.ModuleList(
            nn.Linear(spec.decoder_dim, size, bias=False) for size in spec.vocab_sizes
        )

    def embed_codes(self, codes_PGR: Tensor) -> Tensor:
        """The sum over channels [P, G, E] of the codes' embeddings; an empty id adds exactly 0."""
        summands = []
        for r, (table, empty) in enumerate(zip(self.speech_embeddings, self.spec.empty_ids, strict=True)):
            ids_PG = codes_PGR[..., r]
            summands.append(table(ids_PG).masked_fill((ids_PG == empty).unsqueeze(-1), 0.0))
        return torch.stack(summands).sum(0)

    def embed(self, text_ids_L: Tensor, codes_LGR: Tensor) -> Tensor:
        """What the trunk reads [L, D]: a text position's embedding or an audio position's encoded patch.

        Only audio positions go through the patch encoder, which is the same as masking the others before
        and behind it, since patches do not see each other.
        """
        is_audio_L = text_ids_L == self.spec.tokens.empty
        text_LD: Tensor = self.model.embed_tokens(text_ids_L).masked_fill(is_audio_L[:, None], 0.0)
        rows = is_audio_L.nonzero()[:, 0]
        if not len(rows):
            return text_LD
        encoded_PGE = self.input_local_transformer(self.embed_codes(codes_LGR[rows]))
        patches_PD = self.speech_group_downcast(encoded_PGE.flatten(1))
        return text_LD.index_add(0, rows, patches_PD.to(text_LD.dtype))

    def hidden(
        self, text_ids_L: Tensor, codes_LGR: Tensor, seq: Sequences, cache: Cache | None = None
    ) -> Tensor:
        """Normed hidden states [L, D]: what `logits` and `write_patches` start from."""
        embeddings_LD = self.embed(text_ids_L, codes_LGR)
        return self.head_input(self.trunk(text_ids_L, seq, cache, embeddings_TD=embeddings_LD))

    def _decoder_input(self, codes_PSR: Tensor) -> Tensor:
        """The patch decoder's input [P, S, E] after steps that wrote these codes."""
        embeddings = self.embed_codes(codes_PSR)
        out: Tensor = (
            embeddings
            if self.speech_embeddings_to_local is None
            else self.speech_embeddings_to_local(embeddings)
        )
        return out

    def patch_logits(self, hidden_PD: Tensor, codes_PGR: Tensor) -> list[Tensor]:
        """The patch decoder over known codes (teacher forcing).

        Args:
            hidden_PD: the normed hidden state of the position before each patch.
            codes_PGR: the patches, undelayed and without empty ids.

        Returns:
            Per channel the logits [P, G, V] of its G codes.
        """
        start_P1E = self.hidden_states_downcast(hidden_PD)[:, None]
        written_PSR = delayed(self.spec, codes_PGR)[:, :-1]
        inputs_PSE = torch.cat([start_P1E, self._decoder_input(written_PSR)], 1)
        states_PSE = self.local_transformer(inputs_PSE)
        return [
            head(states_PSE[:, delay : delay + self.spec.group_size])
            for head, delay in zip(self.local_transformer_lm_heads, self.spec.delays, strict=True)
        ]

    def write_patches(self, hidden_PD: Tensor, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """New codes [P, G, R] for the positions behind these hidden states, step by step.

        Args:
            hidden_PD: normed hidden states.
            choose: (channel, its logits [P, V]) -> codes [P]. It must not choose empty ids.
        """
        spec, cache = self.spec, StepCache()
        empty_R = torch.tensor(spec.empty_ids, device=hidden_PD.device)
        written_PSR = empty_R.repeat(len(hidden_PD), spec.num_steps, 1)
        x_P1E = self.hidden_states_downcast(hidden_PD)[:, None]
        for step in range(spec.num_steps):
            state_PE = self.local_transformer(x_P1E, cache)[:, 0]
            for r, delay in enumerate(spec.delays):
                if delay <= step < delay + spec.group_size:
                    written_PSR[:, step, r] = choose(r, self.local_transformer_lm_heads[r](state_PE))
            x_P1E = self._decoder_input(written_PSR[:, step : step + 1])
        return undelayed(spec, written_PSR)

    def loss_parts(
        self,
        batch: AudioBatch,
        weights: LossWeights | None = None,
        *,
        max_patches: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch, in nats.

        Args:
            batch: packed sequences.
            weights: of the losses; the published ones when None.
            max_patches: compute the code losses on this many of the learnt patches, drawn at random, which
                estimates the same means without bias; all when None.
            generator: for that draw.

        Returns:
            `total` (differentiable), and detached `text` and `code_<r>`: the text loss divided by its
            weights' sum, each channel's mean cross-entropy. `total` is their weighted mean, or the text loss
            alone where the batch has no patch to learn; `code_<r>` are then absent.

        Raises:
            ShapeError: `weights` has not one weight per channel.
        """
        weights = LossWeights() if weights is None else weights
        if len(weights.channels) != self.spec.channels:
            raise ShapeError(
                f"the model has {self.spec.channels} audio channels and weights.channels has "
                f"{len(weights.channels)}; give one weight per channel"
            )
        seq = Sequences(batch.cu_seqlens, batch.position_ids)
        hidden_LD = self.hidden(batch.text_ids_L, batch.codes_LGR, seq)
        text = self._text_loss(hidden_LD, batch.text_labels_L, weights.empty_text)
        parts = {"total": text, "text": text.detach()}
        patches_P = batch.patches_P
        if not len(patches_P) or not any(weights.channels):
            return parts
        if max_patches is not None and len(patches_P) > max_patches:
            chosen = torch.randperm(len(patches_P), generator=generator)[:max_patches]
            patches_P = patches_P[chosen.to(patches_P.device)]
        codes_PGR = batch.codes_LGR[patches_P]
        logits = self.patch_logits(hidden_LD[patches_P - 1], codes_PGR)
        total = weights.text * text
        for r, (logits_PGV, weight) in enumerate(zip(logits, weights.channels, strict=True)):
            loss = F.cross_entropy(logits_PGV.flatten(0, 1).float(), codes_PGR[:, :, r].flatten())
            total = total + weight * loss
            parts[f"code_{r}"] = loss.detach()
        parts["total"] = total / (weights.text + sum(weights.channels))
        return parts

    def _text_loss(self, hidden_LD: Tensor, labels_L: Tensor, empty_weight: float) -> Tensor:
        rows = (labels_L != IGNORE).nonzero()[:, 0]
        labels = labels_L[rows]
        logits = self.logits(hidden_LD[rows]).float()
        weight = torch.where(labels == self.spec.tokens.empty, empty_weight, 1.0)
        losses = F.cross_entropy(logits, labels, reduction="none")
        # A batch without a text label has a loss of 0, not of 0 / 0.
        return (losses * weight).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)

    @torch.no_grad()
    def init_weights(self, seed: int, *, zero_outputs: bool = False) -> AudioLM:
        super().init_weights(seed, zero_outputs=zero_outputs)
        for table in self.speech_embeddings:
            assert isinstance(table, nn.Embedding)
            table.weight[table.padding_idx].zero_()  # never read: `embed_codes` masks it
        return self


def part_of(parameter_name: str) -> Literal["encoder", "trunk", "decoder"]:
    """The part of an `AudioLM` that a parameter belongs to, for learning rates per part (Table 3).

    The code embeddings and the projection into the trunk are the encoder's, the heads and the projection out
    of it the decoder's; the published training code leaves them to the trunk by accident.
    """
    first = parameter_name.split(".")[0]
    if first in ("input_local_transformer", "speech_embeddings", "speech_group_downcast"):
        return "encoder"
    return "trunk" if first in ("model", "lm_head") else "decoder"
