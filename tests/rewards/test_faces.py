"""`sateen sandbox`: exit codes, the keys of its JSON, and that it refuses."""

import json

import pytest

from sateen.cli import main
from sateen.rewards import faces
from sateen.rewards.limits import Result

KEYS = [
    "status",
    "exit_code",
    "stdout",
    "stderr",
    "truncated",
    "wall_s",
    "cpu_s",
    "max_rss_bytes",
    "enforced",
]


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("source", "flags", "status", "exit_code"),
    [
        ("print(input())", [], "ok", 0),
        ("raise SystemExit(2)", [], "error", 2),
        ("while True: pass", ["--seconds", "0.5"], "timeout", None),
        ("import os; os.kill(os.getpid(), 9)", [], "killed", 137),
        ("while True: print('x' * 9999)", [], "output", None),
    ],
)
def test_a_contained_run_is_exit_0_and_json(capsys, tmp_path, source, flags, status, exit_code):
    program, stdin = tmp_path / "program.py", tmp_path / "in.txt"
    program.write_text(source)
    stdin.write_text("hello\n")
    assert main(["sandbox", "run", str(program), "--stdin", str(stdin), *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == KEYS
    assert (printed["status"], printed["exit_code"]) == (status, exit_code)
    assert all(set(row) == {"limit", "by"} for row in printed["enforced"].values())


@pytest.mark.usefixtures("sandbox")
def test_memory_is_set_by_its_flag(capsys, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("x = bytearray(200 * 2**20)")
    main(["sandbox", "run", str(program), "--memory-mb", "100"])
    assert json.loads(capsys.readouterr().out)["status"] == "memory"
    main(["sandbox", "run", str(program), "--memory-mb", "400"])
    assert json.loads(capsys.readouterr().out)["status"] == "ok"


@pytest.mark.usefixtures("sandbox")
def test_check_lists_every_limit(capsys):
    assert main(["sandbox", "check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["sandbox", "check", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["available"] is True
    assert [line.split()[0] for line in lines] == list(printed["limits"])
    assert {name for name, row in printed["limits"].items() if row["held"]} == set(faces._ATTEMPTED)


def test_check_says_when_a_limit_does_not_hold(capsys, monkeypatch):
    told = " ".join(name for name in [*faces._ATTEMPTED, "files_written"] if name != "network")
    row = {"limit": None, "by": "nothing"}
    result = Result("ok", 0, told, "", False, 0.0, 0.0, 0, dict.fromkeys(faces._ATTEMPTED, row))
    monkeypatch.setattr(faces, "isolation", lambda: None)
    monkeypatch.setattr(faces, "run", lambda *a, **k: result)
    assert main(["sandbox", "check", "--json"]) == 1
    streams = capsys.readouterr()
    assert json.loads(streams.out)["available"] is False
    assert "does not hold: network" in streams.err


def test_without_isolation_both_refuse(capsys, monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("PATH", str(tmp_path))
    for arguments in (["run", str(program)], ["check"]):
        assert main(["sandbox", *arguments]) == 1
        streams = capsys.readouterr()
        assert streams.out == ""
        assert "`bwrap` is not in PATH" in streams.err
    assert main(["sandbox", "check", "--json"]) == 1
    assert "bwrap" in json.loads(capsys.readouterr().out)["reason"]
    assert not (tmp_path / "ran").exists()
