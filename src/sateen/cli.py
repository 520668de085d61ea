"""The command line: `sateen VERB ...`. Parses flags, then loads the one room that the verb needs.

Results go to stdout and talk to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 a bound was
not met, 130 interrupted. The verbs and their flags are in `verbs.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence

from sateen.errors import ConfigError, SateenError, nearest
from sateen.verbs import VERBS


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one command line; `argv` is without the program's name, sys.argv's when None."""
    flags = vars(build_parser().parse_args(argv))
    name = flags.pop("verb")
    verb = VERBS[name]
    is_debug = os.environ.get("SATEEN_DEBUG") == "1"
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("sateen").setLevel(logging.DEBUG if is_debug else logging.INFO)
    try:
        code = _function(verb.function)(**flags)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        hint = "; the same command goes on from what is done" if verb.resumes else ""
        print(f"\nsateen: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away, as `| head` does; without this Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if is_debug or package in ("", "sateen"):
            raise
        print(f"sateen: error: `{name}` needs the package {package}, which is not installed", file=sys.stderr)
        return 1
    except (SateenError, OSError) as error:
        if is_debug:
            raise
        for line in str(error).splitlines():
            print(f"sateen: error: {line}", file=sys.stderr)
        return error.exit_code if isinstance(error, SateenError) else 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; its result holds `verb` and that verb's keyword arguments."""
    from sateen import __version__

    parser = argparse.ArgumentParser(
        prog="sateen",
        description="Train, evaluate and serve hybrid-attention language models.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 a bound was not met\n"
        "`sateen VERB --help` shows a verb's flags and examples; SATEEN_DEBUG=1 shows tracebacks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sateen {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        examples = "\n".join(f"  sateen {example}" for example in verb.examples)
        one = verbs.add_parser(
            name,
            help=verb.help,
            description=f"{verb.help[0].upper()}{verb.help[1:]}.",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.flags(one)
    return parser


def bench(name: str, arguments: Sequence[str] = ()) -> int:
    """Runs `benchmarks/NAME.py` of the checkout in a process of its own; returns its exit code.

    A hyphen in the name stands for an underscore in the file's.

    Raises:
        ConfigError: there is no such benchmark, or no checkout; the message lists the known ones.
    """
    import subprocess
    from pathlib import Path

    folders = [Path("benchmarks"), Path(__file__).parents[2] / "benchmarks"]
    files = [file for folder in reversed(folders) for file in sorted(folder.glob("[!_]*.py"))]
    known = {file.stem.replace("_", "-"): file for file in files}
    if name not in known:
        names = ", ".join(sorted(known)) or "none; benchmarks come with a checkout, not with the package"
        raise ConfigError(f"there is no benchmark {name!r}{nearest(name, known)} (known: {names})")
    return subprocess.run([sys.executable, str(known[name]), *arguments], check=False).returncode


def _function(target: str) -> Callable[..., int | None]:
    function: Callable[..., int | None] = pkgutil.resolve_name(target)
    return function


if __name__ == "__main__":
    sys.exit(main())
