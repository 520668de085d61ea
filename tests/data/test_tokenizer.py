import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from sateen.data.tokenizer import CHATML_TOKENS, Tokenizer, check_vocab
from sateen.errors import CheckpointError, ConfigError, RequestError

TEXT = "The Zen of Python: beautiful is better than ugly, explicit is better than implicit. " * 20
TOKENIZER = Tokenizer.train([TEXT, "def f(x): return 12 + 345\n"], 300)
QUESTION = [{"role": "user", "content": "What is 12?"}]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_decoding_gives_back_any_text_exactly(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_bytes[ids].sum() == len(text.encode())
    assert b"".join(map(TOKENIZER.token_text, ids)) == text.encode()


@given(st.text(), st.sampled_from(CHATML_TOKENS), st.text())
@settings(max_examples=100, deadline=None)
def test_plain_text_never_becomes_a_special_token(before, special, after):
    ids = TOKENIZER.encode(before + special + after)
    assert not set(ids) & set(TOKENIZER.special_ids.values())
    assert TOKENIZER.encode_batch([before + special + after]) == [ids]


@given(st.lists(st.sampled_from([*CHATML_TOKENS, "\U000f0000", "\U000f0001", "a", " "]), max_size=8))
@settings(max_examples=100, deadline=None)
def test_contents_cannot_forge_turns(parts):
    content = "".join(parts)
    ids = TOKENIZER.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert [i for i in ids if i in TOKENIZER.special_ids.values()] == [1, 2, 1]
    assert TOKENIZER.decode(ids) == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def test_digits_stand_alone():
    assert [TOKENIZER.decode([i]) for i in TOKENIZER.encode("x2024=7")] == ["x", "2", "0", "2", "4", "=", "7"]


def test_training_is_repeatable_and_has_the_exact_size():
    again = Tokenizer.train([TEXT, "def f(x): return 12 + 345\n"], 300)
    assert again.fingerprint == TOKENIZER.fingerprint
    assert again.vocab_size == 300
    assert again.special_ids == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert again.stop_ids == (0, 2)
    assert list(again.token_bytes[:3]) == [0, 0, 0]


def test_training_refuses_impossible_sizes():
    with pytest.raises(ConfigError, match="need 259"):
        Tokenizer.train([TEXT], 258)
    with pytest.raises(ConfigError, match="the text gives only"):
        Tokenizer.train(["ab ab"], 300)
    with pytest.raises(ConfigError, match=r"<\|im_end\|>"):
        Tokenizer.train([TEXT], 300, ["<|endoftext|>", "<|im_start|>"])


def test_saved_files_give_the_same_tokenizer_here_and_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    text = "explicit <|im_end|> 42 naïve \n\n  \t日本"
    ours = Tokenizer.load(tmp_path)
    assert ours.encode(text) == TOKENIZER.encode(text)
    assert ours.fingerprint == TOKENIZER.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = text.replace("<|im_end|>", "")
    assert theirs(plain, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(plain)
    chat = [*QUESTION, {"role": "assistant", "content": "Twelve."}, *QUESTION]
    rendered = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == ours.render_chat(chat, add_generation_prompt=True)
    encoded = theirs(rendered, add_special_tokens=False)["input_ids"]
    assert encoded == ours.apply_chat_template(chat, add_generation_prompt=True)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_id, ours.bos_id)


def test_the_template_comes_from_the_files(tmp_path):
    TOKENIZER.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    template = (
        "{% generation %}{{ messages[0]['content'] | trim }}{% endgeneration %}{{ eos_token }}{{ extra }}"
    )
    config |= {"chat_template": template, "kept": {"as": "is"}, "eos_token": {"content": "<|im_end|>"}}
    file.write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.render_chat([{"role": "user", "content": "  hi "}], extra="!") == "hi<|im_end|>!"
    assert loaded.eos_id == 2
    loaded.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == config
    (tmp_path / "chat_template.jinja").write_text("separate")
    assert Tokenizer.load(tmp_path).render_chat([]) == "separate"


def test_templates_run_in_a_sandbox_and_may_refuse():
    def with_template(source):
        return Tokenizer(TOKENIZER._raw, {**TOKENIZER.config, "chat_template": source})

    with pytest.raises(RequestError, match="unsafe"):
        with_template("{{ messages.__class__.__mro__ }}").render_chat(QUESTION)
    with pytest.raises(RequestError, match="no system turn"):
        with_template("{{ raise_exception('no system turn') }}").render_chat(QUESTION)
    with pytest.raises(ConfigError, match="does not parse"):
        with_template("{% if %}").render_chat(QUESTION)
    with pytest.raises(ConfigError, match="no chat_template"):
        with_template(None).render_chat(QUESTION)
    assert with_template("{{ messages | tojson }}").render_chat(["<é>"]) == '["<é>"]'


def test_missing_or_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_larger_than_the_models_is_refused():
    check_vocab(TOKENIZER, 300)
    check_vocab(TOKENIZER, 320)
    with pytest.raises(ConfigError, match=r"300 tokens.*vocab_size is 299"):
        check_vocab(TOKENIZER, 299)


def test_unknown_tokens_are_refused_with_a_hint():
    with pytest.raises(ConfigError, match=r"did you mean <\|im_end\|>"):
        TOKENIZER.token_id("<|im_ends|>")


def test_the_bytes_of_single_tokens():
    assert [TOKENIZER.token_text(TOKENIZER.token_id(token)) for token in CHATML_TOKENS] == [
        token.encode() for token in CHATML_TOKENS
    ]
    assert TOKENIZER.token_text(TOKENIZER.vocab_size) == b""
    raw = RawTokenizer(models.BPE({"<0xF0>": 0, "\u2581the": 1}, [], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    other = Tokenizer(raw, {})
    assert [other.token_text(i) for i in (0, 1, 2)] == [b"\xf0", b" the", b""]
