"""The command line: parsing, exit codes, what goes to which stream, and how little it loads."""

import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sateen import cli
from sateen.cli import build_parser, main
from sateen.errors import BackendUnavailable, ConfigError
from sateen.verbs import VERBS, Verb

HEAVY = {"torch", "numpy", "pydantic", "rich", "transformers", "safetensors", "matplotlib"}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after this code."""
    report = f"{code}\nimport sys\nprint('|'.join(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True).stdout
    return set(out.strip().splitlines()[-1].split("|"))


def use(monkeypatch: pytest.MonkeyPatch, function: object, *, resumes: bool = False) -> None:
    """Makes `sateen ops` run this function."""
    monkeypatch.setitem(
        VERBS, "ops", VERBS["ops"]._replace(function="sateen.cli:_of_this_test", resumes=resumes)
    )
    monkeypatch.setattr(cli, "_of_this_test", function, raising=False)


def raiser(error: BaseException) -> object:
    def function(**flags: object) -> int:
        raise error

    return function


@pytest.mark.parametrize("argument", [["--help"], ["--version"], *[[verb, "--help"] for verb in VERBS]])
def test_help_is_answered_without_heavy_imports(argument: list[str]) -> None:
    code = f"from sateen.cli import main\ntry:\n    main({argument})\nexcept SystemExit as end:\n"
    code += "    assert end.code == 0"
    assert not loaded_by(code) & HEAVY


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("sateen", set()),
        ("sateen.errors", set()),
        ("sateen.verbs", set()),
        ("sateen.receipt", set()),
        ("sateen.config", {"pydantic"}),
        ("sateen.run", {"pydantic", "rich"}),
    ],
)
def test_light_rooms_load_no_torch(module: str, allowed: set[str]) -> None:
    assert loaded_by(f"import {module}") & HEAVY <= allowed


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help_with_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for example in VERBS[name].examples:
        assert f"  sateen {example}\n" in out
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)]
        if words[-1] != "--help":
            assert build_parser().parse_args(words).verb == name


@pytest.mark.parametrize("name", VERBS)
def test_every_verbs_function_takes_its_flags(name: str) -> None:
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', VERBS[name].examples[0])]
    flags = vars(build_parser().parse_args(words))
    del flags["verb"]
    inspect.signature(pkgutil.resolve_name(VERBS[name].function)).bind(**flags)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: VERB"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: RECIPE"),
        (["generate", "m"], "the following arguments are required: -p/--prompt"),
        (["generate", "m", "-p", "x", "--max-tokens", "0"], "0 should be at least 1"),
        (["generate", "m", "-p", "x", "--max-tokens", "x"], "invalid whole number value: 'x'"),
        (["generate", "m", "-p", "x", "--draft", "big"], "invalid choice: 'big'"),
        (["generate", "m", "-p", "x", "--temp", "1"], "unrecognized arguments: --temp 1"),
        (["inspect", "m", "--context", "1,x"], "invalid list of whole numbers value: '1,x'"),
        (["eval", "m", "--tasks", "a,,b"], "'a,,b' should be names with commas between them"),
        (["demo", "--minutes", "-1"], "-1 should be above 0"),
    ],
)
def test_wrong_usage_exits_2_and_talks_on_stderr(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err


def test_flags_reach_the_function_as_keywords() -> None:
    flags = vars(
        build_parser().parse_args(
            ["train", "--set", "a=1", "--set", "b=2", "r.toml", "o.toml", "--out", "d", "--dry-run"]
        )
    )
    assert flags == {
        "verb": "train",
        "recipe": "r.toml",
        "overlays": ["o.toml"],
        "sets": ["a=1", "b=2"],
        "out": "d",
        "dry_run": True,
    }
    assert build_parser().parse_args(["inspect", "m", "--context", "1,20"]).context == (1, 20)
    assert build_parser().parse_args(["bench", "n", "--help", "-x"]).arguments == ["--help", "-x"]


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_the_functions_code_is_the_exit_code(
    returned: int | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, lambda json: returned)
    assert main(["ops"]) == code


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError("one\ntwo"), 2, "sateen: error: one\nsateen: error: two\n"),
        (BackendUnavailable("no"), 1, "sateen: error: no\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "sateen: error: [Errno 2] No such file: 'x'\n"),
        (
            ModuleNotFoundError("", name="matplotlib.pyplot"),
            1,
            "sateen: error: `ops` needs the package matplotlib, which is not installed\n",
        ),
    ],
)
def test_errors_are_one_line_each_unless_debugging(
    error: Exception,
    code: int,
    lines: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, raiser(error))
    monkeypatch.delenv("SATEEN_DEBUG", raising=False)
    assert main(["ops"]) == code
    assert capsys.readouterr() == ("", lines)
    monkeypatch.setenv("SATEEN_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["ops"])


@pytest.mark.parametrize("error", [ModuleNotFoundError("gone", name="sateen.gone"), ZeroDivisionError()])
def test_our_own_bugs_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, raiser(error))
    with pytest.raises(type(error)):
        main(["ops"])


def test_an_interruption_exits_130_and_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, raiser(KeyboardInterrupt()))
    assert main(["ops"]) == 130
    assert capsys.readouterr().err == "\nsateen: interrupted\n"
    use(monkeypatch, raiser(KeyboardInterrupt()), resumes=True)
    assert main(["ops"]) == 130
    assert capsys.readouterr().err.endswith(": interrupted; the same command goes on from what is done\n")
    resuming = [name for name, verb in VERBS.items() if verb.resumes and name != "ops"]
    assert resuming == ["demo", "train", "data"]


def test_a_closed_pipe_is_no_traceback() -> None:
    code = (
        "import os, sys, sateen.cli as cli\nfrom sateen.verbs import VERBS\n"
        "cli.shout = lambda json: print('x' * 10**6)\n"
        "VERBS['ops'] = VERBS['ops']._replace(function='sateen.cli:shout')\n"
        "sys.exit(cli.main(['ops']))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_bench_runs_a_script_of_the_checkout_and_returns_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "speed.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
    (tmp_path / "benchmarks" / "two_words.py").write_text("import sys\nsys.exit(4)\n")
    (tmp_path / "benchmarks" / "_shared.py").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "speed", "--help", "7"]) == 3
    assert capfd.readouterr().out == "['--help', '7']\n"
    assert main(["bench", "two-words"]) == 4
    assert main(["bench", "sped"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("sateen: error: there is no benchmark 'sped'; did you mean speed? (known: ")
    assert "_shared" not in err


def test_public_names_are_listed_and_others_refused() -> None:
    import sateen

    assert {"load_model", "LLM", "SamplingParams", "ops", "placement", "__version__"} == set(sateen.__all__)
    assert set(sateen.__all__) <= set(dir(sateen))
    with pytest.raises(AttributeError, match="module 'sateen' has no attribute 'lod_model'"):
        sateen.lod_model  # noqa: B018


@pytest.mark.parametrize("name", ["load_model", "LLM", "SamplingParams", "ops", "placement"])
def test_public_names_lead_somewhere(name: str) -> None:
    import sateen

    found = getattr(sateen, name)
    assert found.__name__.rpartition(".")[2] == name


def test_rows_are_plain() -> None:
    assert all(isinstance(verb, Verb) and verb.examples and verb.help[0].islower() for verb in VERBS.values())
