import json
import sys

import pytest

from sateen.data.text import Document, python_docs, split_heldout, text_dir
from sateen.errors import ConfigError

MODULE = '''# Copyright somebody: a licence header of more than thirty words is still not prose that a model
# should learn by heart, because it stands in each and every one of the files and says nothing of Python.
"""Tools for knots."""


# A comment of some length reads as prose when it says in whole sentences why the code is written
# in this way and not in another one, which a short remark beside a line of code never does at all.
class Knot(object):
    """A knot in a rope, which holds because every strand of it presses upon another strand."""

    def untie(self, hard=False):
        """Open the knot again; this takes the longer the more often it has been pulled tight.

        # A line of a docstring that begins with a hash is not a comment
        """
        # short remark
        if hard:
            def pull():
                """Pull."""


def broken(): raise RuntimeError("modules are read, not run")
broken()
'''


def test_a_module_gives_docstrings_signatures_and_longer_comments(tmp_path):
    (tmp_path / "knots.py").write_text(MODULE)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_knots.py").write_text(MODULE.replace("knot", "test"))
    (tmp_path / "bad.py").write_text("def (")
    [text] = [d.text for d in python_docs(tmp_path) if d.name.startswith("module/")]
    assert text == (
        "module knots\n\nTools for knots.\n\n"
        "class Knot(object)\n\n"
        "A knot in a rope, which holds because every strand of it presses upon another strand.\n\n"
        "def untie(self, hard=False)\n\n"
        "Open the knot again; this takes the longer the more often it has been pulled tight.\n\n"
        "# A line of a docstring that begins with a hash is not a comment\n\n"
        "def pull()\n\nPull.\n\n"
        "A comment of some length reads as prose when it says in whole sentences why the code is written\n"
        "in this way and not in another one, which a short remark beside a line of code never does at all.\n"
    )


def test_paragraphs_are_kept_once(tmp_path):
    (tmp_path / "a.py").write_text(MODULE)
    (tmp_path / "b.py").write_text(MODULE.replace("Tools", "Other tools") + '"""x"""\n')
    own = '    """' + "This paragraph of the second module is its own. " * 6 + '"""\n'
    (tmp_path / "c.py").write_text(MODULE + "def f():\n" + own)
    texts = {d.name: d.text for d in python_docs(tmp_path) if d.name.startswith("module/")}
    assert list(texts) == ["module/a", "module/c"]  # too little is left of b
    assert "every strand" in texts["module/a"]
    assert "every strand" not in texts["module/c"]
    assert "This paragraph" in texts["module/c"]


def test_the_interpreters_own_documentation_is_enough_for_the_demo():
    documents = python_docs()
    names = [d.name for d in documents]
    assert len(set(names)) == len(names)
    assert {"topic/lambda", "module/argparse", "module/asyncio.tasks"} <= set(names)
    train, heldout = split_heldout(documents)
    train_bytes = sum(len(d.text.encode()) for d in train)
    heldout_bytes = sum(len(d.text.encode()) for d in heldout)
    assert train_bytes > 2_000_000
    assert 0.01 < heldout_bytes / (train_bytes + heldout_bytes) < 0.12
    assert not any("\t" in d.text or "\n\n\n" in d.text or " \n" in d.text for d in documents)


def test_a_python_without_its_documentation_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"holds no \.py files"):
        python_docs(tmp_path)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match=r"pydoc_data\.topics"):
        python_docs()


def test_the_split_depends_on_each_name_alone():
    documents = [Document(f"d{i}", str(i)) for i in range(2000)]
    train, heldout = split_heldout(documents, 0.05)
    assert sorted([*train, *heldout], key=lambda d: int(d.text)) == documents
    assert 60 <= len(heldout) <= 140  # 100 expected, standard deviation 9.7
    assert split_heldout(documents[::2], 0.05)[1] == [d for d in heldout if int(d.text) % 2 == 0]
    assert split_heldout(documents, 0.0)[1] == []
    assert split_heldout(documents, 1.0)[0] == []


def test_text_dir_reads_files_and_lines_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("bee")
    (tmp_path / "sub" / "a.txt").write_text("é")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "x.bin").write_bytes(b"\xff")
    rows = [{"text": "one\u2028line", "n": 1}, {"text": "two"}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    assert list(text_dir(tmp_path)) == [
        Document("b.md", "bee"),
        Document("c.jsonl:1", "one\u2028line"),
        Document("c.jsonl:2", "two"),
        Document("sub/a.txt", "é"),
    ]
    assert list(text_dir(tmp_path / "b.md")) == [Document("b.md", "bee")]


def test_text_dir_names_what_it_cannot_read(tmp_path):
    with pytest.raises(ConfigError, match="no text to read"):
        list(text_dir(tmp_path / "missing"))
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 2"):
        list(text_dir(bad))
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "fine"}\n{"body": "x"}\n')
    with pytest.raises(ConfigError, match=r"lines\.jsonl:2: no string under 'text'"):
        list(text_dir(lines))
    lines.write_text("{\n")
    with pytest.raises(ConfigError, match=r"lines\.jsonl:1: not a JSON object"):
        list(text_dir(lines))
