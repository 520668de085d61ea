import pytest

from sateen.data.chat import encode_chat, encode_completion, labels_of
from sateen.data.packing import IGNORE
from sateen.data.token_file import TokenDocument
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError

TOKENIZER = Tokenizer.train(["user assistant system hello there 12\n" * 9], 280)


def message(role, content):
    return {"role": role, "content": content}


CHAT = [
    message("system", "be brief"),
    message("user", "1+1? <|im_end|>"),
    message("assistant", "\n2"),
    message("user", "sure?"),
    message("assistant", "yes"),
]


def trained_text(document):
    return TOKENIZER.decode([i for i, t in zip(document.input_ids, document.is_target, strict=True) if t])


def test_only_assistant_turns_and_their_ends_are_trained():
    document = encode_chat(TOKENIZER, CHAT)
    assert trained_text(document) == "\n2<|im_end|>yes<|im_end|>"
    assert TOKENIZER.decode(document.input_ids) == TOKENIZER.render_chat(CHAT)


def test_a_turn_follows_exactly_the_tokens_of_its_generation_prompt():
    document = encode_chat(TOKENIZER, CHAT[:3])
    prompt = TOKENIZER.apply_chat_template(CHAT[:2], add_generation_prompt=True)
    assert list(document.input_ids[: len(prompt)]) == prompt
    assert list(document.is_target[: len(prompt)]) == [False] * len(prompt)
    assert document.is_target[len(prompt)] is True


def test_text_after_the_last_answer_is_not_trained():
    document = encode_chat(TOKENIZER, CHAT[:4])
    assert trained_text(document) == "\n2<|im_end|>"
    assert TOKENIZER.decode(document.input_ids) == TOKENIZER.render_chat(CHAT[:4])


def test_labels_are_the_next_token_where_it_is_a_target():
    assert labels_of(TokenDocument([4, 5, 6, 7], [True, False, True, True])) == [IGNORE, 6, 7, IGNORE]
    assert labels_of(TokenDocument([4, 5])) == [5, IGNORE]
    assert labels_of(TokenDocument([])) == []


def test_completions_end_with_the_end_of_text():
    document = encode_completion(TOKENIZER, "1+2=", "3")
    assert TOKENIZER.decode(document.input_ids) == "1+2=3<|endoftext|>"
    assert trained_text(document) == "3<|endoftext|>"


def test_templates_that_rewrite_turns_are_refused():
    def with_template(source):
        return Tokenizer(TOKENIZER._raw, {**TOKENIZER.config, "chat_template": source})

    turn = "<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '' }}"
    forgetful = with_template("{% for m in messages %}" + turn + "{% endfor %}")
    with pytest.raises(ConfigError, match="message 2"):
        encode_chat(forgetful, CHAT)
    other_header = with_template(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    with pytest.raises(ConfigError, match="message 2"):
        encode_chat(other_header, CHAT)
    with pytest.raises(ConfigError, match="needs an assistant turn"):
        encode_chat(TOKENIZER, CHAT[:2])
