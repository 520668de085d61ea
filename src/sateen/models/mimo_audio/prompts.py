"""The texts around the audio: MiMo-Audio's chat and few-shot layouts, for training documents and for prompts.

A document is a prompt of this file joined with its answer; answers are what is learnt. The layouts are the
published ones, the wording of the instructions is ours. Shape letters: T frames, R channels.
Source: MiMo-Audio, arXiv 2512.23808 §3.3 and §4, and the prompts of its published code (mimo_audio.py) and
of its evaluation (XiaomiMiMo/MiMo-Audio-Eval).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sateen.models.mimo_audio.layout import (
    AudioLayout,
    audio_input,
    join,
    part,
    patch_positions,
    stream,
    text_positions,
)
from sateen.models.mimo_audio_lm import AudioSpec

TRANSCRIBE = "Write down what is said."
SPEAK = "Say this"
NO_THOUGHT = "<think>\n\n</think>\n"
MIXED = "[Int]:"  # how the base model's prompts begin that hold speech and text


class Prompts:
    """Layouts for one model and tokenizer.

    Args:
        spec: the model's.
        encode: text -> ids, nothing added, special tokens' strings encoded as text.
        token_id: a special token's string -> its id.
        text_chunk: text tokens per turn of a stream.
        patch_chunk: patches per turn; both are 5 in the release.
    """

    def __init__(
        self,
        spec: AudioSpec,
        encode: Callable[[str], list[int]],
        token_id: Callable[[str], int],
        *,
        text_chunk: int = 5,
        patch_chunk: int = 5,
    ):
        self.spec, self.encode = spec, encode
        self.text_chunk, self.patch_chunk = text_chunk, patch_chunk
        self._start, self._end = token_id("<|im_start|>"), token_id("<|im_end|>")

    def text(self, *pieces: str | int | AudioLayout) -> AudioLayout:
        """Text, token ids and layouts end to end; nothing of the text is learnt."""
        made = [
            piece
            if isinstance(piece, AudioLayout)
            else text_positions(self.spec, [piece] if isinstance(piece, int) else self.encode(piece))
            for piece in pieces
        ]
        return join(made)

    def heard(self, codes_TR: Tensor) -> AudioLayout:
        """Audio that the model hears."""
        return audio_input(self.spec, codes_TR)

    def said(self, text: str, codes_TR: Tensor) -> AudioLayout:
        """Speech that the model says, `<|sostm|>` and `<|eostm|>` included; nothing of it is learnt."""
        return stream(
            self.spec, self.encode(text), codes_TR, text_chunk=self.text_chunk, patch_chunk=self.patch_chunk
        )

    def _turn(self, role: str, *parts: str | int | AudioLayout) -> AudioLayout:
        return self.text(self._start, f"{role}\n", *parts, self._end, "\n")

    def _reply(self, *parts: str | int | AudioLayout) -> AudioLayout:
        return self.text(self._start, "assistant\n", *parts)

    def asr(self, codes_TR: Tensor, instruction: str = TRANSCRIBE) -> AudioLayout:
        """Asks for the words of a recording; the answer is `answer_text`."""
        return self.understanding(codes_TR, instruction)

    def understanding(self, codes_TR: Tensor, question: str, *, thinks: bool = False) -> AudioLayout:
        """Asks about a recording; the answer is text, behind a thought where `thinks`."""
        user = self._turn("user", self.heard(codes_TR), question)
        return join([user, self._reply("<think>\n" if thinks else NO_THOUGHT)])

    def tts(self, text: str, instruction: str = SPEAK) -> AudioLayout:
        """Asks for a text to be read; the answer is `answer_speech`.

        Text that is all capitals or all small letters is capitalised first, as the published code does.
        """
        return join(
            [self._turn("user", f"{instruction}: {spoken(text)}"), self._reply(self.spec.tokens.sostm)]
        )

    def dialogue(self, codes_TR: Tensor, *, voice_TR: Tensor | None = None, system: str = "") -> AudioLayout:
        """A spoken question; the answer is `answer_speech`.

        Args:
            codes_TR: what the user says.
            voice_TR: a recording of the voice to answer with.
            system: text that stands before the question.
        """
        before = (
            [self._turn("system", "Your voice should be:", self.heard(voice_TR))]
            if voice_TR is not None
            else []
        )
        opening = [f"{system}\n\n"] if system else []
        user = self._turn("user", *opening, self.heard(codes_TR))
        return join([*before, user, self._reply(self.spec.tokens.sostm)])

    def speech_to_speech(
        self, shots: Sequence[tuple[Tensor, str, Tensor]], codes_TR: Tensor, instruction: str = ""
    ) -> AudioLayout:
        """Few-shot: (input codes, target text, target codes) per shot, then the input to answer.

        The shots hold the target's text, so the model writes text for its own answer too.
        """
        parts: list[str | int | AudioLayout] = [MIXED]
        if instruction:
            parts.append(f"{instruction}\n")
        for heard_TR, text, said_TR in shots:
            parts += [self.heard(heard_TR), "\n", self.said(text, said_TR), " \n\n"]
        return self.text(*parts, self.heard(codes_TR), "\n", self.spec.tokens.sostm)

    def audio_qa(
        self, shots: Sequence[tuple[Tensor, str, str]], codes_TR: Tensor, question: str
    ) -> AudioLayout:
        """Few-shot: (codes, question, answer) per shot, then the recording and question to answer in text."""
        parts: list[str | int | AudioLayout] = [MIXED]
        for heard_TR, asked, answer in shots:
            parts += [self.heard(heard_TR), f"Question: {asked}\nAnswer: {answer}\n\n"]
        return self.text(*parts, self.heard(codes_TR), f"Question: {question}\nAnswer:")

    def continuation(self, codes_TR: Tensor) -> AudioLayout:
        """Audio that goes on: `<|sosp|>` and patches without an end (source: ours)."""
        return join(
            [text_positions(self.spec, [self.spec.tokens.sosp]), patch_positions(self.spec, codes_TR)]
        )

    def answer_text(self, text: str) -> AudioLayout:
        """A written answer with the end of its turn, learnt."""
        return self.text(text, self._end, "\n").learnt(self.spec)

    def answer_speech(self, text: str, codes_TR: Tensor) -> AudioLayout:
        """A spoken answer behind a prompt that ends in `<|sostm|>`, with the end of its turn, learnt."""
        said = self.said(spoken(text), codes_TR)
        return self.text(part(said, 1, len(said)), self._end, "\n").learnt(self.spec)


def spoken(text: str) -> str:
    """The text with one capital in front where it was all capitals or all small letters."""
    return text.capitalize() if text.isupper() or text.islower() else text
