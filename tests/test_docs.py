"""The documentation says what the code does: commands parse or run, paths and links exist, examples compile.

Pages are the Markdown files that people read. A fenced `bash` or `console` block may hold only commands that
this file can check; the cheap ones are run.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import sateen
from sateen.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
STATUS = ROOT / "docs" / "status.md"
# Programs of other projects that a block may call; what they do is not ours to check.
FOREIGN = {"cd", "curl", "git", "source"}
# Folders of the checkout: a path below one of them that stands in backticks must be there.
ROOMS = "benchmarks|docs|examples|native|recipes|src|tests|tools"
MACHINE_PATHS = re.compile(r"(?<![\w.])(?:~/|/(?:home|mnt|opt|root|tmp|usr|var|Users)(?:/|\b))")


class Block(NamedTuple):
    """A fenced block; `line` is that of its first line of content, from 1."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A command line of a page, split as a shell would."""

    place: str
    words: tuple[str, ...]


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    language: str | None = None
    lines: list[str] = []
    for number, line in enumerate((text or page.read_text(encoding="utf-8")).splitlines(), start=1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif language is None:
            language, lines = line.strip().removeprefix("```").strip(), []
        else:
            found.append(Block(page, number - len(lines), language, "\n".join(lines)))
            language = None
    assert language is None, f"{page}: a fenced block is not closed"
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a block: all lines of `bash`, and those behind a `$` of `console`."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            found.append(Command(block.place, tuple(words)))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def status_rows() -> list[list[str]]:
    """The cells of every row of the status table, without its head."""
    rows = [line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows[2:]]


def is_cheap(words: tuple[str, ...]) -> bool:
    """Whether a `sateen` command can be run here: it reads nothing that an earlier command had to make."""
    if words[-1] in ("--help", "--version"):
        return True
    if words[1] == "train":
        return "--dry-run" in words
    return words[1] == "ops" or (words[1] == "inspect" and not words[2].startswith("runs/"))


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [command for block in BLOCKS if block.language in ("bash", "console") for command in commands(block)]
# The status page names one command per bar; they are held to the same rule.
MEASURED = [
    Command(f"docs/status.md: {row[0]}", tuple(shlex.split(command)))
    for row in status_rows()
    if len(row) == 4
    for command in re.findall(r"`([^`]+)`", row[2])
]
OURS = [command for command in (*SHELL, *MEASURED) if command.words[0] == "sateen"]
CHEAP = sorted({command.words for command in OURS if is_cheap(command.words)})
page_id = {"ids": lambda page: str(page.relative_to(ROOT))}


def test_the_pages_are_found():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert names >= {*TOP, "docs/architecture.md", "docs/status.md", "docs/dependencies.md"}
    assert len(OURS) >= 5
    assert len(CHEAP) >= 3


@pytest.mark.parametrize("command", [*SHELL, *MEASURED], ids=lambda c: f"{c.place}: {' '.join(c.words)}")
def test_every_command_is_one_that_exists(command, capsys):
    program, *arguments = command.words
    if program == "sateen":
        _parse(arguments, capsys, command.place)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(arguments) <= targets, f"{command.place}: the Makefile has {sorted(targets)}"
    elif program == "pytest":
        missing = [name for name in arguments if name[0] != "-" and not (ROOT / name.split("::")[0]).exists()]
        assert not missing, f"{command.place}: {missing} do not exist"
    elif program in ("python", "sh"):
        assert (ROOT / arguments[0]).is_file(), f"{command.place}: {arguments[0]} does not exist"
    else:
        assert program in FOREIGN, f"{command.place}: {program} is not a program that this test knows"


def _parse(arguments: list[str], capsys: pytest.CaptureFixture[str], place: str) -> None:
    flags = {}
    code: int | str | None = 0
    try:
        flags = vars(build_parser().parse_args(arguments))
    except SystemExit as end:  # `--help` and `--version` end with 0
        code = end.code
    assert code == 0, f"{place}: sateen {' '.join(arguments)}: {capsys.readouterr().err}"
    files = []
    if flags.get("verb") == "bench":
        files = [f"benchmarks/{flags['name'].replace('-', '_')}.py"]
    elif flags.get("verb") == "train":
        recipes = [flags["recipe"], *flags["overlays"]]
        files = [name if name.endswith(".toml") else f"recipes/{name}.toml" for name in recipes]
    missing = [name for name in files if not (ROOT / name).is_file()]
    assert not missing, f"{place}: {missing} do not exist"


@pytest.mark.parametrize("words", CHEAP, ids=" ".join)
def test_cheap_commands_run(words):
    done = subprocess.run(
        [sys.executable, "-m", "sateen.cli", *words[1:]],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"sateen {' '.join(words[1:])}: {done.stderr}"
    assert done.stdout


@pytest.mark.parametrize("page", PAGES, **page_id)
def test_relative_links_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists() or not file.resolve().is_relative_to(ROOT):
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in _anchors(file):
            wrong.append(f"{target}: no such heading")
    assert not wrong


def _anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub spells them in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, **page_id)
def test_paths_in_backticks_exist(page):
    wrong = []
    for path, _, test in re.findall(rf"`((?:{ROOMS})/[\w./*-]*)(::(\w+))?`", prose(page)):
        if not any(ROOT.glob(path.rstrip("/"))):
            wrong.append(path)
        elif test and f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8"):
            wrong.append(f"{path}::{test}")
    assert not wrong


def test_tests_that_the_parity_page_names_exist():
    """Its rows name `test_x` and further tests in one file, which must define them."""
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    found = re.findall(r"((?:`test_\w+`(?:, )?)+) in `([^`]+)`", page)
    assert len(found) > 15
    for names, file in found:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(test_\w+)`", names):
            assert f"def {name}(" in text, f"{name} is not in {file}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: b.place)
def test_python_examples_compile_and_use_public_names(block):
    tree = ast.parse(block.text, filename=block.place)
    compile(tree, block.place, "exec")
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sateen"
    }
    assert used <= set(sateen.__all__)


@pytest.mark.parametrize("page", PAGES, **page_id)
def test_pages_stand_on_their_own(page):
    text = page.read_text(encoding="utf-8")
    outside = re.findall(r"\.\./shared|\bspecs?[ /]\d\d", text)
    assert not outside, "pages cite papers and files of this repository only"
    assert not MACHINE_PATHS.findall(text), "pages hold no paths of one machine"


@pytest.mark.parametrize("page", PAGES, **page_id)
def test_no_result_is_left_to_fill_in(page):
    """Fails until every placeholder `RESULT:<key>` is replaced by a figure of a committed result file."""
    assert not re.findall(r"RESULT:[\w.-]*", page.read_text(encoding="utf-8"))


def test_status_rows_have_a_bar_a_number_a_command_and_a_date():
    rows = status_rows()
    assert len(rows) >= 12
    wrong = [row for row in rows if len(row) != 4 or not all(row)]
    assert not wrong
    for bar, number, _, date in rows:
        pattern = "-" if number == "not measured yet" else r"\d{4}-\d{2}-\d{2}"
        assert re.fullmatch(pattern, date), f"{bar}: {number!r} of {date!r}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_readers_of_this_file_bite(tmp_path):
    page = tmp_path / "page.md"
    shell = "```bash\nX=1 make demo  # talk\n```\n```console\n$ sateen ops \\\n  --json\nout\n```\n"
    page.write_text(f"a\n{shell}")
    first, second = blocks(page)
    assert (first.line, first.language, second.line) == (3, "bash", 6)
    found = [command.words for block in (first, second) for command in _commands_anywhere(block)]
    assert found == [("make", "demo"), ("sateen", "ops", "--json")]
    assert MACHINE_PATHS.findall("see /home/x, ~/x and `/tmp`") == ["/home/", "~/", "/tmp"]
    assert not MACHINE_PATHS.findall("docs/work/x, a/tmp and and/or")


def _commands_anywhere(block: Block) -> list[Command]:
    """The commands of a block whose page lies outside of the checkout."""
    return commands(block._replace(page=ROOT / "page.md"))
