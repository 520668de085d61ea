import numpy as np
import pytest

from sateen.data.text import Document
from sateen.data.token_file import TokenDocument, TokenFile, write_texts, write_tokens
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError


def write(path, documents, vocab_size=1000):
    return write_tokens(path, documents, vocab_size=vocab_size, tokenizer_sha256="abc")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_what_is_written_is_read(tmp_path, vocab_size, dtype):
    documents = [[5, vocab_size - 1], [], [7], [0, 0, 0]]
    file = write(tmp_path / "f", [TokenDocument(ids) for ids in documents], vocab_size)
    again = TokenFile(tmp_path / "f")
    for opened in (file, again):
        assert opened.tokens.dtype == dtype
        assert opened.num_tokens == 6
        assert [opened.document(i).tolist() for i in range(opened.num_documents)] == [
            [5, vocab_size - 1],
            [7],
            [0, 0, 0],
        ]
        assert opened.targets is None
        assert opened.tokenizer_sha256 == "abc"


def test_masks_are_kept_and_default_to_all_targets(tmp_path):
    file = write(tmp_path / "f", [TokenDocument([1, 2], [False, True]), TokenDocument([3])])
    assert file.targets is not None
    assert file.targets.tolist() == [0, 1, 1]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write(tmp_path / "f", [TokenDocument([1, 2, 3])])

    def interrupted():
        yield TokenDocument([4])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f", interrupted())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "g", interrupted())
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert TokenFile(tmp_path / "f").document(0).tolist() == [1, 2, 3]
    write(tmp_path / "f", [TokenDocument([9])])
    assert TokenFile(tmp_path / "f").tokens.tolist() == [9]


def test_bad_documents_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="from 1 to 1000 in a vocabulary of 1000"):
        write(tmp_path / "f", [TokenDocument([1, 1000])])
    with pytest.raises(ConfigError, match="from -1 to 0"):
        write(tmp_path / "f", [TokenDocument([-1, 0])])
    with pytest.raises(ConfigError, match="1 mask values and 2 tokens"):
        write(tmp_path / "f", [TokenDocument([1, 2], [True])])
    with pytest.raises(ConfigError, match="no documents"):
        write(tmp_path / "f", [])
    with pytest.raises(ConfigError, match="not a token file"):
        TokenFile(tmp_path / "f")
    write(tmp_path / "f", [TokenDocument([1, 2])])
    (tmp_path / "f" / "tokens.bin").write_bytes(b"abc")
    with pytest.raises(ConfigError, match="has 3 bytes, not 4"):
        TokenFile(tmp_path / "f")
    (tmp_path / "own").mkdir()
    with pytest.raises(ConfigError, match="choose another name"):
        write(tmp_path / "own", [TokenDocument([1])])


def test_texts_stand_between_end_tokens(tmp_path):
    tokenizer = Tokenizer.train(["aa bb aa bb cc dd"], 260)
    texts = [Document(str(i), f"aa {i} bb") for i in range(600)]
    file = write_texts(tmp_path / "f", texts, tokenizer)
    assert file.num_documents == 600
    for i in (0, 255, 256, 599):
        ids = file.document(i)
        assert (ids[0], ids[-1]) == (tokenizer.eos_id, tokenizer.eos_id)
        assert tokenizer.decode(ids[1:-1].tolist()) == texts[i].text
    assert tokenizer.token_bytes[np.asarray(file.tokens)].sum() == sum(len(d.text) for d in texts)
