"""Documents of plain text: the Python documentation every machine has, and a reader for users' own files.

`python_docs` builds the demo's corpus from the running interpreter's own help topics, docstrings and longer
comments, read with `ast`: no library module is run, nothing is downloaded. `text_dir` reads recipes' files.
Both return `Document`s in a fixed order; `split_heldout` divides them by name, never inside a document.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from sateen.errors import ConfigError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
# Tests repeat themselves, tables are not English, and installed packages differ between machines.
_TESTS = ("test", "tests", "idle_test", "turtledemo")
_TABLES = ("lib2to3", "encodings", "pydoc_data", "__pycache__")
_SKIPPED_PARTS = frozenset([*_TESTS, *_TABLES, "site-packages", "dist-packages"])
# Shorter comments speak of code that is not in the text; they raised gzip's bits per byte by a tenth.
_MIN_COMMENT_WORDS = 30
_MIN_MODULE_CHARS = 200
_DUPLICATE_CHARS = 40


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        name: unique in its corpus; decides the held-out split.
        text: the text itself.
    """

    name: str
    text: str


def python_docs(stdlib: Path | None = None) -> list[Document]:
    """The Python documentation of this interpreter: one document per help topic and per library module.

    A module's document holds its docstrings under their signatures, then its longer comments. A paragraph
    that an earlier document already had is left out, so that the held-out split is not seen in training.

    Args:
        stdlib: folder of the standard library's sources; the running interpreter's when None.

    Raises:
        ConfigError: this Python came without its help topics or without its library's sources.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as missing:
        raise ConfigError(
            "this Python has no pydoc_data.topics, which the demo's text needs; use a Python with its full "
            "standard library (Debian: libpython3-stdlib), or give a recipe your own text"
        ) from missing
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    modules = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_PARTS & set(path.relative_to(root).parts[:-1])
    ]
    if not modules:
        raise ConfigError(f"{root} holds no .py files; the demo's text needs the standard library's sources")
    documents = [Document(f"topic/{name}", _clean(text)) for name, text in sorted(topics.items())]
    for path in modules:
        name = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        text = _clean(_module_text(name, path))
        if len(text) >= _MIN_MODULE_CHARS:
            documents.append(Document(f"module/{name}", text))
    return _without_repeats(documents)


def _module_text(name: str, path: Path) -> str:
    """A module's docstrings under their signatures, then its comments; empty if it does not parse."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return ""  # a few library files are bad on purpose: templates and parser samples
    parts = [f"module {name}\n\n{ast.get_docstring(tree) or ''}"]
    doc_lines = _doc_lines(tree)
    for node in _definitions(tree):
        doc = ast.get_docstring(node)
        if doc:
            parts.append(f"{_signature(node)}\n\n{doc}")
            doc_lines |= _doc_lines(node)
    parts.extend(_comments(source, doc_lines))
    return "\n\n".join(parts)


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """The classes and functions under a node, in the order of the source."""
    # Walking statements alone: expressions hold no definitions and are most of the tree.
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, field, [])
        for child in children if isinstance(children, list) else []:
            if isinstance(child, Definition):
                yield child
            yield from _definitions(child)


def _doc_lines(node: ast.Module | Definition) -> set[int]:
    """The lines of a docstring."""
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return set()


def _signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"


def _comments(source: str, doc_lines: set[int]) -> Iterator[str]:
    """Runs of whole-line comments that read as prose, joined; licence headers and rulers are left out."""
    run: list[str] = []
    for number, line in enumerate(source.split("\n"), start=1):
        text = line.strip()
        if text.startswith("#") and number not in doc_lines:
            run.append(text.lstrip("#").strip())
        elif run:
            yield from _prose(run)
            run = []
    yield from _prose(run)


def _prose(lines: list[str]) -> Iterator[str]:
    text = "\n".join(lines)
    words = re.findall(r"[A-Za-z]{2,}", text)
    is_boilerplate = re.search(r"copyright|licen[cs]e|-\*-|noqa|type: ignore|all rights", text, re.IGNORECASE)
    letters = sum(c.isalpha() or c.isspace() for c in text)
    if len(words) >= _MIN_COMMENT_WORDS and not is_boilerplate and letters > 0.8 * len(text):
        yield text


def _clean(text: str) -> str:
    """The text without tabs, trailing spaces, rulers, heading underlines and repeated blank lines."""
    lines = []
    for line in inspect.cleandoc(text).splitlines():
        line = line.rstrip()
        if not re.fullmatch(r"\s*([^\w\s])\1{3,}", line):
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _without_repeats(documents: Iterable[Document]) -> list[Document]:
    """The documents without longer paragraphs that came before, compared up to white space."""
    seen: set[str] = set()
    kept: list[Document] = []
    for document in documents:
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= _DUPLICATE_CHARS:
                if key in seen:
                    continue
                seen.add(key)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs).strip() + "\n"
        if len(text) >= _MIN_MODULE_CHARS:
            kept.append(Document(document.name, text))
    return kept


def split_heldout(
    documents: Iterable[Document], share: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; a document's name alone decides, so adding others moves none.

    Args:
        documents: the corpus.
        share: expected share of documents held out, between 0 and 1.
    """
    train: list[Document] = []
    heldout: list[Document] = []
    for document in documents:
        (heldout if is_held_out(document.name, share) else train).append(document)
    return train, heldout


def is_held_out(name: str, share: float) -> bool:
    """Whether what has this name is kept for evaluation; about `share` of all names are."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def text_dir(
    path: str | Path, *, suffixes: tuple[str, ...] = SUFFIXES, field: str = "text"
) -> Iterator[Document]:
    """The documents of one file or of a folder, in the order of their paths.

    A `.jsonl` file gives one document per line, every other file is one document.

    Args:
        path: a file, or a folder that is searched with its subfolders.
        suffixes: which files of a folder are read.
        field: the key of a `.jsonl` line's text.

    Raises:
        ConfigError: nothing to read, a file that is not UTF-8, or a line without the field.
    """
    root = Path(path)
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    files = [file for file in found if file.suffix in suffixes]
    if not files:
        raise ConfigError(f"{root}: no text to read; accepted are files or folders of {', '.join(suffixes)}")
    for file in files:
        name = file.name if file == root else file.relative_to(root).as_posix()
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: not UTF-8 at byte {error.start}; convert it") from error
        if file.suffix == ".jsonl":
            yield from _json_lines(file, name, text, field)
        elif text.strip():
            yield Document(name, text)


def _json_lines(file: Path, name: str, text: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{number}: not a JSON object ({error.msg})") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise ConfigError(f"{file}:{number}: no string under {field!r}; every line needs one")
        yield Document(f"{name}:{number}", row[field])
