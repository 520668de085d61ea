"""What MiMo-Audio's language model reads: positions that each hold a text token or a patch of codes.

A position is a text id and G frames of R codes. A text position has the channels' empty ids for codes, an
audio position has `<|empty|>` for text and undelayed codes. Sequences are built from segments, packed end to
end for the model, and convert to the published [1 + R, G * L] matrix and back. Shape letters: L positions,
G frames of a patch, R channels, T frames, P patches, S steps of the patch decoder.
Source: MiMo-Audio, arXiv 2512.23808 §2.2, and its published code (XiaomiMiMo/MiMo-Audio,
process_speechdata.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sateen.errors import ShapeError
from sateen.models.mimo_audio_lm import AudioSpec

IGNORE = -100


@dataclass(frozen=True)
class AudioLayout:
    """One sequence.

    Attributes:
        text_ids_L: int64 text id of each position, `<|empty|>` where there is audio.
        codes_LGR: int64 undelayed codes, empty ids where there is text.
        text_loss_L: bool, the position's text id is learnt.
        audio_loss_L: bool, the position is a patch whose codes are learnt.
    """

    text_ids_L: Tensor
    codes_LGR: Tensor
    text_loss_L: Tensor
    audio_loss_L: Tensor

    def __len__(self) -> int:
        return int(self.text_ids_L.numel())

    def learnt(self, spec: AudioSpec, *, text: bool = True, audio: bool = True) -> AudioLayout:
        """The same positions, all of them learnt: their text ids, their codes, or both."""
        is_audio_L = self.text_ids_L == spec.tokens.empty
        return replace(
            self,
            text_loss_L=torch.full_like(is_audio_L, text),
            audio_loss_L=is_audio_L if audio else torch.zeros_like(is_audio_L),
        )

    def audio_codes(self, spec: AudioSpec) -> Tensor:
        """The codes [T, R] of all audio positions, in order."""
        return self.codes_LGR[self.text_ids_L == spec.tokens.empty].flatten(0, 1)

    def matrix(self, spec: AudioSpec) -> Tensor:
        """The published form, int64 [1 + R, G * L]: text ids in every G-th column of row 0, -100 between."""
        text_LG = self.text_ids_L.new_full((len(self), spec.group_size), IGNORE)
        text_LG[:, 0] = self.text_ids_L
        return torch.cat([text_LG.view(1, -1), self.codes_LGR.flatten(0, 1).T])

    @classmethod
    def from_matrix(cls, matrix: Tensor, spec: AudioSpec) -> AudioLayout:
        """The sequence of a published matrix; nothing of it is learnt.

        Raises:
            ShapeError: not [1 + R, a multiple of G].
        """
        rows, group = 1 + spec.channels, spec.group_size
        if matrix.ndim != 2 or matrix.shape[0] != rows or matrix.shape[1] % group:
            raise ShapeError(f"an input matrix is [{rows}, {group} * L]; got {list(matrix.shape)}")
        codes_LGR = matrix[1:].T.unflatten(0, (-1, group)).contiguous()
        return _unlearnt(matrix[0, ::group].to(torch.int64), codes_LGR.to(torch.int64))


@dataclass(frozen=True)
class AudioBatch:
    """Sequences laid end to end, with what is learnt of them.

    Attributes:
        text_ids_L, codes_LGR: as in `AudioLayout`.
        position_ids: int64 [L], from 0 in each sequence.
        cu_seqlens: int32 [B + 1], offsets of the sequences; first 0, last L.
        text_labels_L: int64, the text id of the next position, or -100 where none is learnt.
        patches_P: int64, the positions of the patches that are learnt; each is written from the position
            before it.
    """

    text_ids_L: Tensor
    codes_LGR: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    text_labels_L: Tensor
    patches_P: Tensor

    @property
    def num_tokens(self) -> int:
        """Positions."""
        return int(self.text_ids_L.numel())

    @property
    def num_sequences(self) -> int:
        return int(self.cu_seqlens.numel()) - 1

    def to(self, device: torch.device | str) -> AudioBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items()}
        return AudioBatch(**moved)


def _unlearnt(text_ids_L: Tensor, codes_LGR: Tensor) -> AudioLayout:
    nothing = torch.zeros(len(text_ids_L), dtype=torch.bool)
    return AudioLayout(text_ids_L, codes_LGR, nothing, nothing.clone())


def text_positions(spec: AudioSpec, ids: Sequence[int]) -> AudioLayout:
    """One position per text id."""
    empty_R = torch.tensor(spec.empty_ids)
    text_ids_L = torch.tensor(list(ids), dtype=torch.int64)
    return _unlearnt(text_ids_L, empty_R.expand(len(text_ids_L), spec.group_size, -1).clone())


def patch_positions(spec: AudioSpec, codes_TR: Tensor) -> AudioLayout:
    """One position per G frames; the last frame is repeated to fill the last patch.

    Raises:
        ShapeError: not [T, R], or ids that are not codes of their channel.
    """
    if codes_TR.ndim != 2 or codes_TR.shape[1] != spec.channels:
        raise ShapeError(
            f"codes are frame-major [T, {spec.channels}], the first {spec.channels} codebooks of the "
            f"tokenizer; got {list(codes_TR.shape)}"
        )
    codes_TR = codes_TR.to("cpu", torch.int64)
    empty_R = torch.tensor(spec.empty_ids)
    wrong = (codes_TR < 0) | (codes_TR >= torch.tensor(spec.vocab_sizes)) | (codes_TR == empty_R)
    if bool(wrong.any()):
        t, r = wrong.nonzero()[0].tolist()
        raise ShapeError(
            f"codes[{t}, {r}] is {int(codes_TR[t, r])}; channel {r} has codes 0 to {spec.vocab_sizes[r] - 1} "
            f"without the empty id {spec.empty_ids[r]}"
        )
    short = -len(codes_TR) % spec.group_size
    if short:
        codes_TR = torch.cat([codes_TR, codes_TR[-1:].expand(short, -1)])
    codes_LGR = codes_TR.unflatten(0, (-1, spec.group_size)) if len(codes_TR) else codes_TR.view(
        0, spec.group_size, spec.channels
    )  # fmt: skip
    return _unlearnt(torch.full((len(codes_LGR),), spec.tokens.empty), codes_LGR)


def audio_input(spec: AudioSpec, codes_TR: Tensor) -> AudioLayout:
    """Audio that the model hears: `<|sosp|>`, the patches, `<|eosp|>`."""
    tokens = spec.tokens
    return join(
        [
            text_positions(spec, [tokens.sosp]),
            patch_positions(spec, codes_TR),
            text_positions(spec, [tokens.eosp]),
        ]
    )


def stream(
    spec: AudioSpec, text_ids: Sequence[int], codes_TR: Tensor, *, text_chunk: int = 5, patch_chunk: int = 5
) -> AudioLayout:
    """Speech that the model says: text and patches taking turns between `<|sostm|>` and `<|eostm|>`.

    The text runs ahead by one chunk; `<|eot|>` joins its last chunk; the longer side goes on alone. The
    published chunks are 5 tokens and 5 patches (0.8 s).
    """
    tokens, text = spec.tokens, list(text_ids)
    chunks = [text[i : i + text_chunk] for i in range(0, len(text), text_chunk)] or [[]]
    chunks[-1].append(tokens.eot)
    patches = patch_positions(spec, codes_TR)
    parts = [text_positions(spec, [tokens.sostm])]
    for turn in range(max(len(chunks), -(-len(patches) // patch_chunk))):
        parts.append(text_positions(spec, chunks[turn] if turn < len(chunks) else []))
        parts.append(part(patches, turn * patch_chunk, (turn + 1) * patch_chunk))
    parts.append(text_positions(spec, [tokens.eostm]))
    return join(parts)


def part(layout: AudioLayout, start: int, stop: int) -> AudioLayout:
    """Positions [start, stop)."""
    return AudioLayout(*(value[start:stop] for value in vars(layout).values()))


def join(layouts: Sequence[AudioLayout]) -> AudioLayout:
    """One sequence of these, in order."""
    columns = zip(*(vars(layout).values() for layout in layouts), strict=True)
    return AudioLayout(*(torch.cat(column) for column in columns))


def pack(spec: AudioSpec, layouts: Sequence[AudioLayout]) -> AudioBatch:
    """A batch of these sequences."""
    whole = join(layouts)
    lengths = [len(layout) for layout in layouts]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    has_past_L = position_ids > 0
    # What position l learns stands at l + 1, unless that begins another sequence.
    labels_L = torch.where(has_past_L & whole.text_loss_L, whole.text_ids_L, IGNORE).roll(-1)
    is_learnt_L = has_past_L & whole.audio_loss_L & (whole.text_ids_L == spec.tokens.empty)
    patches_P = is_learnt_L.nonzero()[:, 0]
    return AudioBatch(whole.text_ids_L, whole.codes_LGR, position_ids, cu_seqlens, labels_L, patches_P)


def delayed(spec: AudioSpec, codes_PGR: Tensor) -> Tensor:
    """The codes [P, S, R] by the step that writes them: channel r from step `delays[r]` on, empty around."""
    empty_R = torch.tensor(spec.empty_ids, device=codes_PGR.device)
    out_PSR = empty_R.repeat(len(codes_PGR), spec.num_steps, 1)
    for r, delay in enumerate(spec.delays):
        out_PSR[:, delay : delay + spec.group_size, r] = codes_PGR[:, :, r]
    return out_PSR


def undelayed(spec: AudioSpec, codes_PSR: Tensor) -> Tensor:
    """The inverse of `delayed`: [P, G, R]."""
    columns = [
        codes_PSR[:, delay : delay + spec.group_size, r] for r, delay in enumerate(spec.delays)
    ]  # fmt: skip
    return torch.stack(columns, -1)
