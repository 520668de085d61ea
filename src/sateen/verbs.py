"""The verbs of the command line: which function each one runs and which flags it takes.

A verb's function takes its flags as keyword arguments and returns its exit code, or None for 0. A new verb is
one function here that adds its flags, and one row of `VERBS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

MODEL = "a Hugging Face directory, a run folder (its last checkpoint) or a preset"


class Verb(NamedTuple):
    """A row of `VERBS`.

    Attributes:
        function: `module:function`, imported when the verb runs.
        help: one line for the list of verbs.
        flags: adds the verb's flags to its parser.
        examples: command lines for `--help`, without the leading `sateen `.
        resumes: the same command continues after an interruption.
    """

    function: str
    help: str
    flags: Callable[[argparse.ArgumentParser], None]
    examples: tuple[str, ...]
    resumes: bool = False


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=_positive, default=10.0, metavar="N", help="length on two cores (10)"
    )
    parser.add_argument("--fresh", action="store_true", help="start over, deleting what an earlier demo left")


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a .toml file, or the name of one in recipes/")
    parser.add_argument("overlays", nargs="*", metavar="OVERLAY", help="recipes merged over it, in order")
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="A.B=VALUE",
        help="change one setting; stages go by index or name; an empty VALUE takes a setting away",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and touch nothing")


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="text to continue")
    _sampling(parser, max_tokens=64, temperature=0.0)
    _json(parser, "text, token ids, finish reason and draft acceptance")


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    _sampling(parser, max_tokens=256, temperature=0.7)


def _sampling(parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float) -> None:
    parser.add_argument(
        "--max-tokens", type=_count, default=max_tokens, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature", type=float, default=temperature, metavar="T",
        help="0 takes the likeliest token each time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P",
        help="sample among the likeliest tokens that hold this share (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    _modes(parser)


def _modes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft", choices=("auto", "mtp", "none"), default="auto",
        help="who proposes tokens for the model to check (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("auto", "int8", "int4", "fairy2"), default="auto",
        help="as stored, rounded to 8 or 4 bits, or complex two-bit masters packed (default: %(default)s)",
    )  # fmt: skip
    _caches(parser)


def _caches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--attention", choices=("auto", "float", "int8", "int8-half"), default="auto",
        help="floating point, integer products, or those for the scores alone; auto takes integer products "
        "over int8 keys and values (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "fp32", "bf16", "fp16", "int8"), default="auto",
        help="of cached keys and values; auto is the model's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--int8-budget", type=_positive, default=0.05, metavar="E",
        help="layers whose integer attention errs more, as a relative L2 error on a short text, compute in "
        "floating point (default: %(default)s)",
    )  # fmt: skip


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=_port, default=8000, metavar="P", help="0 takes a free one and prints it (8000)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="asked of clients (SATEEN_API_KEY, or none)")
    parser.add_argument("--served-model-name", metavar="NAME", help="for clients (default: MODEL as given)")
    parser.add_argument("--max-num-seqs", type=_count, default=16, metavar="N", help="in work at once (16)")
    parser.add_argument("--max-model-len", type=_count, metavar="N", help="tokens of prompt and answer")
    parser.add_argument(
        "--max-waiting", type=_count, default=256, metavar="N", help="in the queue; more are refused (256)"
    )
    parser.add_argument(
        "--max-body-bytes", type=_count, default=4 << 20, metavar="N", help="of a request (%(default)s)"
    )
    parser.add_argument("--request-timeout", type=_positive, metavar="S", help="of a request (none)")
    parser.add_argument(
        "--drain-seconds", type=_positive, default=30.0, metavar="S", help="for open answers at SIGTERM (30)"
    )
    _modes(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--context", type=_counts, default=(), metavar="N,M", help="contexts to size the cache for"
    )
    parser.add_argument("--kv-dtype", default="auto", metavar="D", help="cache dtype (default: the model's)")
    _json(parser)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="a Hugging Face directory, a run folder (last checkpoint) or a .gguf"
    )
    parser.add_argument("destination", metavar="DST", help="directory to write; a model there is replaced")
    parser.add_argument(
        "--weights", default="keep",
        choices=("keep", "packed", "float", "phase", "fairy2i", "ternary", "int2"),
        help="of the linear layers: `packed` stores the codes of a quantised model, `float` takes a "
        "quantisation off, a method's name quantises and keeps the weights as masters (default: keep)",
    )  # fmt: skip
    parser.add_argument(
        "--dialect", choices=("hub", "transformers"),
        help="spelling of MiMo-V2-Flash's config.json (default: as it is)",
    )  # fmt: skip
    parser.add_argument("--stages", type=_count, metavar="T", help="bits per weight of fairy2i (2)")
    parser.add_argument(
        "--activations", choices=("int8", "float"), help="of a method's layers (fairy2i: float, others: int8)"
    )
    parser.add_argument(
        "--skip", type=_names, metavar="A,B", help="pieces of names of layers that stay as they are (lm_head)"
    )
    parser.add_argument(
        "--dtype", default="keep", choices=("keep", "float32", "bfloat16", "float16"),
        help="of tensors in floating point; FP8 weights are dequantised to it (default: keep)",
    )  # fmt: skip
    parser.add_argument(
        "--mtp", metavar="DIR", help="further MTP heads, as the separate release of MiMo-7B's has them"
    )


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--tasks", type=_names, default=("perplexity",), metavar="A,B",
        help="perplexity, names of verifiable tasks, or audio for a run on speech (default: perplexity)",
    )  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="text for perplexity (default: held-out Python docs)")
    parser.add_argument("--num-examples", type=_count, default=200, metavar="N", help="per task (200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the task examples (default: 0)")
    parser.add_argument(
        "--length", type=_counts, default=(), metavar="N,M",
        help="tokens of the questions of needle, multikey, vt and cwe (1024)",
    )  # fmt: skip
    parser.add_argument(
        "--lm-eval", type=_names, default=(), metavar="A,B", help="tasks of lm-evaluation-harness instead"
    )
    parser.add_argument("--limit", type=_count, metavar="N", help="questions per harness task (all)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each (the task's own)")
    parser.add_argument("--include-path", metavar="DIR", help="a folder with harness tasks of your own")
    _caches(parser)
    parser.add_argument(
        "--receipt", metavar="DIR", help="a folder for receipt.json and RECEIPT.md of all this (none)"
    )
    _json(parser)


def _data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="speech", required=True)
    speech = actions.add_parser("speech", help="recorded speech with transcripts, from Debian's archive")
    speech.add_argument("--out", required=True, metavar="DIR", help="folder of the corpus; sets there stay")
    speech.add_argument(
        "--sets", type=_names, default=("festvox-ru", "asterisk-en"), metavar="A,B",
        help="festvox-ru and asterisk-en, -es, -fr, -it, -ru (default: festvox-ru,asterisk-en)",
    )  # fmt: skip
    _json(speech, "what each set holds")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder; writes its report.html")


def _receipt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a receipt.json, or a run or model folder that has one")
    parser.add_argument("second", nargs="?", metavar="B", help="another one to compare it with")
    _json(parser)


def _ops(parser: argparse.ArgumentParser) -> None:
    _json(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a script in benchmarks/ of the checkout")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="passed on to the script")


def _sandbox(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="run|check", required=True)
    run = actions.add_parser("run", help="run a Python program and print how it ended as JSON")
    run.add_argument("program", metavar="PROGRAM.py", help="the program; the sandbox sees a copy")
    run.add_argument("--stdin", metavar="FILE", help="what the program reads (default: nothing)")
    run.add_argument(
        "--seconds", type=_positive, default=10.0, metavar="S", help="on the clock and of CPU time (10)"
    )
    run.add_argument(
        "--memory-mb", type=_count, default=512, metavar="M", help="all its processes together (512)"
    )
    check = actions.add_parser("check", help="list each limit and how it is enforced on this machine")
    _json(check)


def _experts(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="trace|forecast|place|simulate", required=True)
    ones = {
        "trace": "size, load and state of each layer",
        "forecast": "shares to come, with interval, state and past errors",
        "place": "a placement in EPLB's maps, and whether moving pays",
        "simulate": "what placement policies would have earned",
    }
    for name, line in ones.items():
        one = actions.add_parser(name, help=line, allow_abbrev=False)
        one.add_argument("trace", metavar="TRACE", help="an .npz file, such as RUN/traces/expert_load.npz")
        one.add_argument("--run", metavar="NAME", help="which run of a file that holds several")
        _json(one)
        if name == "trace":
            continue
        steps = {"forecast": None, "place": 500, "simulate": 300}[name]
        one.add_argument(
            "--horizon", type=_count, default=steps, required=steps is None, metavar="H", help="steps ahead"
        )
        one.add_argument("--method", default="sw_flat", metavar="M", help="forecaster (default: %(default)s)")
        one.add_argument("--window", type=_count, default=100, metavar="W", help="steps it looks back (100)")
        if name == "forecast":
            continue
        one.add_argument("--ranks", type=_count, required=True, metavar="R", help="devices")
        one.add_argument("--slots", type=_count, required=True, metavar="S", help="physical experts in all")
        one.add_argument("--tokens-per-s", type=_positive, default=1e6, metavar="N", help="of one rank (1e6)")
        one.add_argument("--expert-bytes", type=_positive, default=1e8, metavar="N", help="moved (1e8)")
        one.add_argument("--bytes-per-s", type=_positive, default=5e10, metavar="N", help="of a link (5e10)")
        if name == "place":
            one.add_argument("--balance", choices=("ours", "eplb"), default="ours", help="packing (ours)")
            one.add_argument("--groups", type=_count, default=1, metavar="N", help="of experts, for eplb (1)")
            one.add_argument("--nodes", type=_count, default=1, metavar="N", help="for eplb (1)")
        else:
            one.add_argument("--start", type=_count, default=200, metavar="T", help="first step (200)")
            one.add_argument("--threshold", type=_positive, default=0.9, metavar="B", help="floor (0.9)")


def _audio(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="encode|decode|say|transcribe", required=True)
    tokenizer = "an audio tokenizer, a run folder that trained one, or a model with one in audio_tokenizer/"
    encode = actions.add_parser("encode", help="the codes of a sound file", allow_abbrev=False)
    encode.add_argument("source", metavar="IN", help="WAV, FLAC, OGG or MP3; any rate, channels are averaged")
    encode.add_argument("out", metavar="OUT.safetensors", help="tensor `codes`, int16 [R, frames]")
    encode.add_argument("--quantizers", type=_count, metavar="R", help="leading residual stages (all)")
    decode = actions.add_parser("decode", help="the sound that codes stand for", allow_abbrev=False)
    decode.add_argument("source", metavar="IN.safetensors", help="what `audio encode` wrote")
    decode.add_argument("out", metavar="OUT.wav", help="16-bit, at the tokenizer's rate; .flac works too")
    encode.epilog = "example: sateen audio encode in.wav codes.safetensors --model runs/audio-tiny"
    decode.epilog = "example: sateen audio decode codes.safetensors out.wav --model runs/audio-tiny"
    speaker = "an audio language model, or a run folder that trained one"
    say = actions.add_parser("say", help="a text read aloud by an audio language model", allow_abbrev=False)
    say.add_argument("text", metavar="TEXT", help="what to say")
    say.add_argument("out", metavar="OUT.wav", help="16-bit, at the tokenizer's rate; .flac works too")
    say.add_argument("--seconds", type=_positive, default=20.0, metavar="S", help="longest answer (20)")
    say.add_argument("--seed", type=int, default=0, metavar="N", help="of the random choices (0)")
    transcribe = actions.add_parser("transcribe", help="the words of a sound file", allow_abbrev=False)
    transcribe.add_argument("source", metavar="IN", help="WAV, FLAC, OGG or MP3; any rate")
    transcribe.add_argument("--max-tokens", type=_count, default=256, metavar="N", help="at most (256)")
    say.epilog = 'example: sateen audio say "Good morning." morning.wav --model runs/audio-tiny'
    transcribe.epilog = "example: sateen audio transcribe morning.wav --model runs/audio-tiny"
    for one in (encode, decode, say, transcribe):
        one.add_argument("--model", metavar="PATH", help=tokenizer if one in (encode, decode) else speaker)
        if one in (say, transcribe):
            one.add_argument("--tokenizer", metavar="PATH", help="an audio tokenizer (the model's own)")
        _json(one)


def _json(parser: argparse.ArgumentParser, what: str = "the result") -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} should be at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} should be above 0")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{text} should be from 0 to 65535")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} should be names with commas between them")
    return names


# argparse puts a converter's name into its messages.
_count.__name__, _positive.__name__, _counts.__name__ = "whole number", "number", "list of whole numbers"
_port.__name__ = "port"


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "sateen.demo:main", "train, evaluate and report a small model here", _demo,
        ("demo", "demo --minutes 5 --out runs/mine"), resumes=True,
    ),
    "train": Verb(
        "sateen.run:main", "run or resume the stages of a recipe", _train,
        ("train recipes/demo.toml", "train demo --set stages.sft.tokens=1e5 --out runs/short",
         "train demo --dry-run"), resumes=True,
    ),
    "generate": Verb(
        "sateen.engine.faces:generate", "continue a text", _generate,
        ('generate runs/demo -p "A list is"',
         'generate runs/demo -p "A list is" --temperature 0.8 --seed 1 --json'),
    ),
    "chat": Verb(
        "sateen.engine.faces:chat", "talk with a model in the terminal", _chat,
        ("chat runs/demo", "chat runs/demo --temperature 0"),
    ),
    "serve": Verb(
        "sateen.engine.server.faces:serve", "answer over HTTP: OpenAI's interface and a chat page", _serve,
        ("serve runs/demo", "serve runs/demo --port 0 --api-key SECRET --max-num-seqs 32",
         "serve runs/demo --kv-cache-dtype int8 --int8-budget 0.03"),
    ),
    "inspect": Verb(
        "sateen.checkpoint.inspect:main", "layers, parameters, bytes and cache sizes of a model", _inspect,
        ("inspect runs/demo", "inspect mimo-7b --context 4096,32768 --json"),
    ),
    "convert": Verb(
        "sateen.checkpoint.convert:main", "write a model in another form of its weights", _convert,
        ("convert runs/demo runs/demo-bf16 --dtype bfloat16",
         "convert runs/demo runs/demo-theirs --dialect transformers",
         "convert MiMo-7B-Base MiMo-7B-three-heads --mtp MiMo-7B-MTPs",
         "convert runs/demo runs/demo-2bit --weights fairy2i --stages 2 --skip lm_head,experts",
         "convert runs/demo-2bit runs/demo-packed --weights packed"),
    ),
    "eval": Verb(
        "sateen.eval.faces:main", "perplexity and verifiable tasks", _eval,
        ("eval runs/demo", "eval runs/demo --tasks perplexity,recall,sums --json",
         "eval runs/demo --tasks needle,multikey,vt,cwe --length 256,1024",
         "eval runs/demo --kv-cache-dtype int8 --int8-budget 0.03 --receipt runs/demo-int8",
         "eval runs/demo --lm-eval arc_easy,hellaswag --limit 100"),
    ),
    "data": Verb(
        "sateen.data.speech:main", "fetch data that recipes read", _data,
        ("data speech --out data/speech",
         "data speech --out data/speech --sets festvox-ru,asterisk-en,asterisk-es"), resumes=True,
    ),
    "report": Verb("sateen.report:main", "write a run's report.html", _report, ("report runs/demo",)),
    "receipt": Verb(
        "sateen.receipt:main", "show a receipt, or compare two", _receipt,
        ("receipt runs/demo", "receipt runs/demo runs/other --json"),
    ),
    "ops": Verb(
        "sateen.ops.table:main", "kernels, their backends and which can run here", _ops, ("ops", "ops --json")
    ),
    "sandbox": Verb(
        "sateen.rewards.faces:main", "run an untrusted program, or show how it is contained", _sandbox,
        ("sandbox check", "sandbox check --json", "sandbox run program.py --stdin input.txt --seconds 2"),
    ),
    "experts": Verb(
        "sateen.placement.faces:main", "expert loads: forecast them, place experts by them", _experts,
        ("experts trace runs/demo/hybrid/traces/expert_load.npz",
         "experts forecast runs/demo/hybrid/traces/expert_load.npz --horizon 100 --json",
         "experts place runs/demo/hybrid/traces/expert_load.npz --ranks 4 --slots 8 --json"),
    ),
    "audio": Verb(
        "sateen.engine.audio.codec:main", "sound to codes and back, text to sound and back", _audio,
        ("audio encode speech.wav codes.safetensors --model runs/audio-tiny",
         "audio encode speech.wav codes.safetensors --model runs/audio-tiny --quantizers 4 --json",
         "audio decode codes.safetensors speech-again.wav --model runs/audio-tiny",
         'audio say "Good morning." morning.wav --model runs/audio-tiny --seed 1',
         "audio transcribe morning.wav --model runs/audio-tiny"),
    ),
    "bench": Verb(
        "sateen.cli:bench", "run a benchmark of the checkout", _bench,
        ("bench attention", "bench attention --help"),
    ),
}  # fmt: skip
