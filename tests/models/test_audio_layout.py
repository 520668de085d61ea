"""Layouts of MiMo-Audio's language model: the published matrix, streams, batches, delays, prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sateen.errors import ShapeError
from sateen.models.mimo_audio import layout as lay
from sateen.models.mimo_audio.prompts import Prompts
from sateen.models.mimo_audio_lm import AudioSpec, AudioTokens
from sateen.models.registry import preset

SPEC = AudioSpec.from_hf(
    preset("mimo-audio-mini")
    | {
        "audio_channels": 3,
        "speech_vocab_size": "10-8-6",
        "speech_zeroemb_idx": "9-7-5",
        "delay_pattern": "0-1-2",
    }
)


def draw_codes(spec: AudioSpec, frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.randint(size - 1, (frames,), generator=generator)  # the empty id is the last one
        for size in spec.vocab_sizes
    ]
    return torch.stack(columns, 1)


def test_the_matrix_of_a_small_document_by_hand() -> None:
    spec = SPEC
    tokens = spec.tokens
    codes = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 1, 2], [7, 3, 4], [8, 6, 1]])
    layout = lay.join([lay.text_positions(spec, [30]), lay.audio_input(spec, codes)])
    e0, e1, e2 = [9] * 4, [7] * 4, [5] * 4
    expected = [
        [
            30,
            *[-100] * 3,
            tokens.sosp,
            *[-100] * 3,
            *[tokens.empty, -100, -100, -100] * 2,
            tokens.eosp,
            *[-100] * 3,
        ],
        [*e0, *e0, 1, 4, 6, 7, 8, 8, 8, 8, *e0],
        [*e1, *e1, 2, 5, 1, 3, 6, 6, 6, 6, *e1],
        [*e2, *e2, 3, 0, 2, 4, 1, 1, 1, 1, *e2],
    ]
    assert layout.matrix(spec).tolist() == expected
    back = lay.AudioLayout.from_matrix(layout.matrix(spec), spec)
    assert torch.equal(back.text_ids_L, layout.text_ids_L)
    assert torch.equal(back.codes_LGR, layout.codes_LGR)
    assert back.audio_codes(spec).tolist() == [*codes.tolist(), *[codes[-1].tolist()] * 3]


def test_a_stream_takes_turns_and_the_longer_side_goes_on_alone() -> None:
    spec = SPEC
    t = spec.tokens

    def shape(text: int, patches: int) -> list[str]:
        names = {t.sostm: "(", t.eostm: ")", t.eot: "T", t.empty: "a"}
        layout = lay.stream(spec, [20] * text, draw_codes(spec, 4 * patches))
        return "".join(names.get(i, "x") for i in layout.text_ids_L.tolist())  # type: ignore[return-value]

    assert shape(5, 5) == "(xxxxxTaaaaa)"
    assert shape(6, 7) == "(xxxxxaaaaaxTaa)"
    assert shape(2, 11) == "(xxTaaaaaaaaaaa)"
    assert shape(12, 3) == "(xxxxxaaaxxxxxxxT)"
    assert shape(0, 1) == "(Ta)"


def test_packing_labels_by_hand() -> None:
    spec = SPEC
    empty = spec.tokens.empty
    patch = lay.patch_positions(spec, draw_codes(spec, 4))
    first = lay.join(
        [lay.text_positions(spec, [20]), lay.join([patch, lay.text_positions(spec, [21])]).learnt(spec)]
    )
    second = lay.join([patch.learnt(spec), patch, patch.learnt(spec, text=False)])
    batch = lay.pack(spec, [first, second])
    assert batch.text_ids_L.tolist() == [20, empty, 21, empty, empty, empty]
    assert batch.text_labels_L.tolist() == [empty, 21, -100, -100, -100, -100]
    assert batch.patches_P.tolist() == [1, 5]  # the first position of a sequence has nothing before it
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 6]
    assert (batch.num_tokens, batch.num_sequences) == (6, 2)


def test_delays_shift_and_shift_back() -> None:
    spec = SPEC
    codes = draw_codes(spec, 8).view(2, 4, 3)
    out = lay.delayed(spec, codes)
    assert out.shape == (2, 6, 3)
    for p in range(2):
        for step in range(6):
            for r in range(3):
                frame = step - r
                want = int(codes[p, frame, r]) if 0 <= frame < 4 else spec.empty_ids[r]
                assert int(out[p, step, r]) == want
    assert torch.equal(lay.undelayed(spec, out), codes)


def test_bad_codes_are_refused() -> None:
    spec = SPEC
    with pytest.raises(ShapeError, match=r"frame-major"):
        lay.patch_positions(spec, torch.zeros(3, 7, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"codes\[1, 2\] is 5"):
        lay.patch_positions(spec, torch.tensor([[0, 0, 0], [0, 0, 5]]))
    with pytest.raises(ShapeError, match="input matrix"):
        lay.AudioLayout.from_matrix(torch.zeros(4, 6, dtype=torch.int64), spec)


class Letters:
    """A tokenizer of letters: lower-case from 14 on, everything else 13."""

    def encode(self, text: str) -> list[int]:
        return [14 + ord(c) - ord("a") if "a" <= c <= "z" else 13 for c in text]

    def token_id(self, token: str) -> int:
        return {"<|im_start|>": 11, "<|im_end|>": 12}[token]


def show(spec: AudioSpec, layout: lay.AudioLayout) -> str:
    t = spec.tokens
    names = {
        11: "<",
        12: ">",
        t.sosp: "[",
        t.eosp: "]",
        t.empty: "#",
        t.sostm: "(",
        t.eostm: ")",
        t.eot: "!",
        13: ".",
    }
    return "".join(names.get(i, chr(i - 14 + ord("a"))) for i in layout.text_ids_L.tolist())


def test_prompts_and_answers_have_the_published_order() -> None:
    spec, letters = SPEC, Letters()
    prompts = Prompts(spec, letters.encode, letters.token_id)
    codes = draw_codes(spec, 8)
    assert show(spec, prompts.asr(codes, "say")) == "<user.[##]say>.<assistant..think.....think.."
    assert (
        show(spec, prompts.tts("hi", "say")) == "<user.say...i>.<assistant.("
    )  # "Hi": the H is no small letter
    assert show(spec, prompts.tts("hiYo", "say")) == "<user.say..hi.o>.<assistant.("
    assert show(spec, prompts.dialogue(codes)) == "<user.[##]>.<assistant.("
    assert (
        show(spec, prompts.speech_to_speech([(codes, "ab", codes)], codes))
        == ".....".replace(".....", "..nt..") + "[##].(ab!##)...[##].("
    )
    assert show(spec, prompts.continuation(codes)) == "[##"
    answer = prompts.answer_speech("abC", codes)
    assert show(spec, answer) == "ab.!##)>."
    assert bool(answer.text_loss_L.all())
    assert answer.audio_loss_L.tolist() == [c == "#" for c in show(spec, answer)]
    assert not prompts.asr(codes).text_loss_L.any()


def test_token_ids_are_looked_up_by_string() -> None:
    order = "<|sosp|> <|eosp|> <|empty|> <|Human|> <|SpeechLM|> <|sostm|> <|eostm|> <|eot|>".split()
    tokens = AudioTokens.of({text: 100 + i for i, text in enumerate(order)}.__getitem__)
    assert tokens.to_dict() == dict(
        zip("sosp eosp empty human speechlm sostm eostm eot".split(), range(100, 108), strict=True)
    )
    assert AudioTokens().to_dict() == dict(zip(tokens.to_dict(), range(151665, 151673), strict=True))
