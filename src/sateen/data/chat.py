"""Conversations and prompts with answers as tokens, with a mark on those that are trained.

Supervised stages and the task data use this; the template itself is the tokenizer's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from sateen.data.packing import IGNORE
from sateen.data.template import Message
from sateen.data.token_file import TokenDocument
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> TokenDocument:
    """The tokens of a conversation; the targets are the assistant's turns with the token that ends each.

    Each turn is encoded on its own, after exactly the tokens that a generation prompt gives the engine.

    Args:
        tokenizer: has a chat template.
        messages: dictionaries with `role` and `content`; at least one is the assistant's.

    Raises:
        ConfigError: no assistant turn, or a template that rewrites earlier turns or the generation prompt, so
            that the trained tokens would not be those of inference.
    """
    if not any(message.get("role") == "assistant" for message in messages):
        raise ConfigError("a chat example needs an assistant turn; it would train nothing")
    whole = tokenizer.render_chat(messages, is_escaped=True)
    input_ids: list[int] = []
    is_target: list[bool] = []
    cursor = 0
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        prompt = tokenizer.render_chat(messages[:i], add_generation_prompt=True, is_escaped=True)
        through = tokenizer.render_chat(messages[: i + 1], is_escaped=True)
        if not (through.startswith(prompt) and whole.startswith(through)):
            raise ConfigError(
                f"message {i}: the chat template writes this turn differently in training and in generation; "
                "give each assistant turn as an example of its own, last in its conversation"
            )
        context = tokenizer.encode_rendered(whole[cursor : len(prompt)])
        answer = tokenizer.encode_rendered(whole[len(prompt) : len(through)])
        trained = _until_end(answer, tokenizer.stop_ids)
        input_ids += context + answer
        is_target += [False] * len(context) + [True] * trained + [False] * (len(answer) - trained)
        cursor = len(through)
    rest = tokenizer.encode_rendered(whole[cursor:])
    return TokenDocument(input_ids + rest, is_target + [False] * len(rest))


def encode_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> TokenDocument:
    """The tokens of a plain prompt and its completion; the targets are the completion and the end of text."""
    before, after = tokenizer.encode(prompt), [*tokenizer.encode(completion), tokenizer.eos_id]
    return TokenDocument(before + after, [False] * len(before) + [True] * len(after))


def labels_of(document: TokenDocument) -> list[int]:
    """Labels as `PackedBatch` counts them: for each token the next one where that is a target, else -100."""
    ids = list(document.input_ids)
    is_target = [True] * len(ids) if document.is_target is None else list(document.is_target)
    return [ids[i + 1] if is_target[i + 1] else IGNORE for i in range(len(ids) - 1)] + [IGNORE] * bool(ids)


def _until_end(ids: Sequence[int], stops: Sequence[int]) -> int:
    """Tokens up to the last one that ends a turn; what templates write after it is not the model's to say."""
    last = max((i for i, token in enumerate(ids) if token in stops), default=len(ids) - 1)
    return last + 1
