"""The report of synthetic folders: every number arrives, nothing is invented, nothing runs, nothing loads."""

import copy
import json
import math
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sateen.errors import SateenError
from sateen.receipt import Receipt
from sateen.report import ReportError, build_report, main
from sateen.report.drawing import short
from sateen.report.evaluation import at_chance
from sateen.report.plots import smoothed, thinned
from sateen.report.worse import worse_rows

VOID = {"meta", "br", "link", "img", "hr", "input"}


def model(name):
    """A model's section with better numbers for the hybrid, so that nothing got worse."""
    is_hybrid = name == "hybrid"
    windows = [None, 65, 65, None] if is_hybrid else [None] * 4
    kinds = ["sliding_attention" if w else "full_attention" for w in windows]
    mtp = ["sliding_attention" if is_hybrid else "full_attention"] * 2
    sizes = [66_560 if k == "sliding_attention" else 1_048_576 for k in kinds + mtp]
    return {
        "parameters": {"total": 1_234_567, "active": 765_432, "mtp": 98_765},
        "layers": [
            {"index": i, "attention": k, "window": w, "mlp": "moe" if i else "dense"}
            for i, (k, w) in enumerate(zip(kinds, windows, strict=True))
        ],
        "quality": {
            "bits_per_byte": 1.917 if is_hybrid else 1.953,
            "perplexity": 23.41 if is_hybrid else 24.82,
            "tasks": {
                "sums": {"accuracy": 0.874 if is_hybrid else 0.866, "n": 500, "chance": 0.0},
                "recall": {"accuracy": 0.615 if is_hybrid else 0.605, "n": 200, "chance": 0.01},
            },
        },
        "kv": {
            "context": 2048,
            "layers": [
                {"index": i, "layer_kind": k, "bytes": b}
                for i, (k, b) in enumerate(zip(kinds + mtp, sizes, strict=True))
            ],
            "bytes": sum(sizes),
            "bytes_per_token": sum(sizes) / 2048,
        },
        "draft": {
            "sampled": {
                "temperature": 0.8, "acceptance_length": 1.537, "acceptance_by_position": [0.423, 0.114],
                "repetition_4gram": 0.0213,
            },
            "greedy": {
                "temperature": 0.0, "acceptance_length": 2.184, "acceptance_by_position": [0.731, 0.453],
                "repetition_4gram": 0.347,
            },
        },
        "speed": [
            {"what": what, "unit": "tokens/s", "median": median, "p25": low, "p75": high, "n": 9}
            for what, median, low, high in (
                ("decode, drafts", 187.3, 181.2, 190.4),
                ("decode, no draft", 151.6, 149.7, 153.8),
            )
        ],
        "samples": [
            {"kind": "continued text", "prompt": "A string", "completion": f"<script>alert('{name}')"},
            {"kind": "sums (answer 132)", "prompt": "47+85=", "completion": "7+5=12, 4+8+1=13, 132"},
        ],
        "train_tokens": 1_081_344,
        "train_s": 301.0 if is_hybrid else 322.0,
    }  # fmt: skip


def evaluation():
    return {
        "minutes": 10,
        "models": {"hybrid": model("hybrid"), "twin": model("twin")},
        "baselines": {"gzip -9": 2.145, "xz": 2.012, "unigram": 3.321, "bigram": 2.678},
        "worse": [],
        "commands": [
            "sateen demo --minutes 10 --fresh",
            "sateen eval runs/demo/hybrid",
        ],
    }


def run_folder(path, seed=0):
    """A run of four stages with noise on a falling loss."""
    rng = random.Random(seed)
    path.mkdir(parents=True)
    budgets = [
        ("pretrain", 700_000),
        ("pretrain", 100_000),
        ("sft", 200_000),
        ("mtp", 80_000),
    ]
    stages = "".join(
        f'[[stages]]\nstage = "{s}"\ntokens = {t}\ntokens_per_batch = 4096\n' for s, t in budgets
    )
    (path / "run.toml").write_text(f'name = "demo"\n{stages}')
    lines, tokens = [], 0
    for stage, budget in budgets:
        for _ in range(-(-budget // 4096)):
            tokens += 4096
            main_loss = 2.3 + 4.5 * math.exp(-tokens / 150_000) + rng.gauss(0, 0.08) - 0.4 * (stage == "sft")
            line = {"step": len(lines) + 1, "stage": stage, "tokens": tokens, "loss": main_loss * 1.4,
                    "loss_mtp": main_loss + 0.9, "grad_norm": rng.lognormvariate(0, 0.4)}  # fmt: skip
            if stage != "mtp":
                line |= {"loss_main": main_loss, "bits_per_byte": main_loss / 1.6}
            line |= {
                "lr": 0.02 * min(1, tokens / 80_000),
                "tokens_per_s": rng.gauss(3600, 90),
                "step_s": 1.1,
            }
            lines.append(line)
        lines[-1]["heldout_bits_per_byte"] = main_loss / 1.55
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draws = np.random.default_rng(seed)
    shares = draws.dirichlet(np.full(8, 6.0), size=3)
    counts = np.stack([[draws.multinomial(8192, p) for p in shares] for _ in lines]).astype(np.uint32)
    (path / "traces").mkdir()
    np.savez(
        path / "traces" / "expert_load.npz",
        train__counts=counts,
        train__steps=np.arange(1, len(lines) + 1),
        train__meta=np.array(json.dumps({"layers": [1, 2, 3], "unit": "tokens per step"})),
    )
    return counts


def demo_folder(path, numbers=None):
    for seed, name in enumerate(("hybrid", "twin")):
        run_folder(path / name, seed)
    (path / "evaluation.json").write_text(json.dumps(numbers or evaluation()))
    Receipt(
        source={"kind": "recipe", "path": "recipes/demo.toml", "sha256": None},
        hardware={
            "cpu": "Example CPU 9000",
            "cores": 2,
            "memory_bytes": 8 << 30,
            "gpu": None,
        },
        versions={"python": "3.11.9", "torch": "2.13.0"},
    ).write(path)


class Reader(HTMLParser):
    """Checks nesting and collects what a reader gets."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.red, self.words = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.row = None

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        if "id" in values:
            self.ids.append(values["id"])
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data")]
        if tag not in VOID:
            self.open.append((tag, values.get("class")))
        if tag == "tr" and ("div", "bad") in self.open:
            self.row = []

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag
        if tag == "tr" and self.row is not None:
            self.red.append([cell for cell in self.row if cell])
            self.row = None

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data):
        if self.open and self.open[-1][0] not in ("style", "script"):
            self.words.append(data)
        if self.row is not None:
            self.row.append(data)


def read(path):
    reader = Reader()
    page = path.read_text(encoding="utf-8")
    reader.feed(page)
    reader.close()
    assert not reader.open
    reader.page, reader.text = page, " ".join(reader.words)
    return reader


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "demo"
    demo_folder(folder)
    return read(build_report(folder))


def test_the_numbers_of_the_evaluation_are_in_the_page(demo):
    # Worked by hand: 2 full layers of 1 MiB and 4 rings of 65 KiB against 6 full layers.
    assert 2 * 1_048_576 + 4 * 66_560 == 2_363_392
    wanted = [
        "1.917", "1.953", "2.145", "2.012", "3.321", "2.678", "23.41",  # quality and its baselines
        "38%", "2.25 MiB", "6.00 MiB", "1154", "3072",  # allocated bytes, and per token of context
        "87.4%", "61.5%", "60.5%", "1.0%",  # tasks and chance
        "1.537", "2.184", "42%", "11%", "73%", "45%", "2.1%", "34.7%",  # drafts
        "187.3", "181.2", "190.4", "151.6", "1.24x",  # speed
        "1,234,567", "765,432", "98,765", "1,081,344", "5.0", "5.4",  # what ran
        "Example CPU 9000", "2.13.0", "47+85=", "sateen demo --minutes 10 --fresh",
    ]  # fmt: skip
    assert [value for value in wanted if value not in demo.text] == []


def test_a_finished_demo_misses_nothing_and_is_small(demo):
    assert "Missing" not in demo.text
    assert len(demo.page.encode()) < 600_000


def test_the_page_stands_alone(demo):
    assert not any(tag in ("script", "link", "iframe", "object", "embed") for tag, _ in demo.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in demo.links)
    assert "http" not in demo.page
    assert "@import" not in demo.page
    assert all(link.startswith(("url(#", "url( #")) for link in re.findall(r"url\([^)]*", demo.page))


def test_the_page_can_be_read_by_everyone(demo):
    plots = [values for tag, values in demo.tags if tag == "svg"]
    assert len(plots) == 5
    assert all(values.get("role") == "img" and len(values["aria-label"]) > 20 for values in plots)
    tables = sum(tag == "table" for tag, _ in demo.tags)
    assert (
        tables == sum(tag == "caption" for tag, _ in demo.tags) == sum(tag == "thead" for tag, _ in demo.tags)
    )
    assert {values.get("scope") for tag, values in demo.tags if tag == "th"} == {
        "col",
        "row",
    }
    assert len(demo.ids) == len(set(demo.ids))
    for link in demo.links:
        assert not link.startswith("#") or link[1:] in demo.ids
    assert 'name="viewport"' in demo.page
    assert "prefers-color-scheme: dark" in demo.page
    assert set(re.findall(r"var\(--([\w-]+)\)", demo.page)) <= set(re.findall(r"--([\w-]+):", demo.page))
    assert [tag for tag, _ in demo.tags if re.fullmatch(r"h\d", tag)][:2] == [
        "h1",
        "h2",
    ]


def test_samples_are_text(demo):
    assert "&lt;script&gt;alert(&#x27;hybrid&#x27;)" in demo.page
    assert "<script" not in demo.page
    assert "<script>alert('twin')" in demo.text


def test_stages_and_layers_are_drawn(demo):
    assert "Stages: 1 pretrain, 2 pretrain, 3 sft, 4 mtp." in demo.text
    blocks = [values for tag, values in demo.tags if tag == "li" and "--kind" in values.get("style", "")]
    kinds = [(values["style"], values["class"]) for values in blocks]
    full, sliding = "--kind:var(--full)", "--kind:var(--sliding)"
    assert kinds[:4] == [
        (full, "dense"),
        (sliding, "moe"),
        (sliding, "moe"),
        (full, "moe"),
    ]
    assert kinds[4:] == [(full, "dense")] + [(full, "moe")] * 3


def test_no_red_rows_when_nothing_got_worse(demo):
    assert demo.red == []
    assert "Nothing of what was measured got worse." in demo.text


def _change(path, value):
    def apply(numbers):
        place = numbers["models"]["hybrid"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return apply


RED = {
    "quality": (("quality", "bits_per_byte"), 1.99, {"bits per byte"}),
    "baseline": (("quality", "bits_per_byte"), 2.1, {"bits per byte", "bits per byte against xz"}),
    "task": (("quality", "tasks", "sums", "accuracy"), 0.85, {"sums accuracy"}),
    # 0.01 + 2 sqrt(0.01 * 0.99 / 200) = 0.0241: 0.02 is chance, 0.03 is not.
    "chance": (
        ("quality", "tasks", "recall", "accuracy"), 0.02, {"recall accuracy", "recall accuracy is at chance"}
    ),
    "above chance": (("quality", "tasks", "recall", "accuracy"), 0.03, {"recall accuracy"}),
    "drafts": (("speed", 0, "median"), 151.5, {"decode tokens/s with drafts"}),
    "decode": (("speed", 1, "median"), 151.5, {"decode tokens/s, no draft"}),
    "bytes": (("kv", "bytes"), 7_000_000, {"KV bytes"}),
    "training": (("train_s",), 323.0, {"training tokens/s"}),
    "nan": (("quality", "bits_per_byte"), math.nan, set()),
    "equal": (("quality", "bits_per_byte"), 1.953, set()),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "expected"), RED.values(), ids=RED)
def test_red_rows_follow_the_numbers(path, value, expected):
    numbers = evaluation()
    _change(path, value)(numbers)
    assert {row.what for row in worse_rows(numbers)} == expected


def test_red_rows_reach_the_page_once(tmp_path):
    numbers = evaluation()
    numbers["worse"] = [{"what": "bits per byte", "before": 1.953, "after": 1.961},
                        {"what": "a <b>listed</b> row", "before": 3.25, "after": 4.75}]  # fmt: skip
    numbers["models"]["hybrid"]["quality"]["bits_per_byte"] = 1.961
    numbers["models"]["hybrid"]["speed"][0]["median"] = 140.5
    demo_folder(tmp_path / "demo", numbers)
    reader = read(build_report(tmp_path / "demo"))
    assert [row[:3] for row in reader.red[1:]] == [
        ["bits per byte", "1.953", "1.961"],
        ["a <b>listed</b> row", "3.25", "4.75"],
        ["decode tokens/s with drafts", "151.6", "140.5"],
    ]
    assert "Nothing of what was measured got worse." not in reader.text
    assert "0.93x" in reader.text


MISSING = {
    "quality": ["bits per byte", "sums accuracy", "bits per byte of the hybrid"],
    "kv": ["KV bytes of both models", "KV bytes of the hybrid"],
    "draft": [
        "acceptance length",
        "sampled draft acceptance",
        "greedy draft acceptance",
    ],
    "layers": ["layers of the hybrid"],
    "samples": ["samples of the hybrid"],
}


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_section_is_named(tmp_path, key):
    numbers = evaluation()
    del numbers["models"]["hybrid"][key]
    (tmp_path / "evaluation.json").write_text(json.dumps(numbers))
    text = read(build_report(tmp_path)).text
    for what in [
        *MISSING[key],
        "loss curves (metrics.jsonl)",
        "hardware and versions (receipt.json)",
    ]:
        assert f"Missing: {what}." in text


def test_an_empty_evaluation_names_every_section(tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    reader = read(build_report(tmp_path))
    assert reader.text.count("Missing: ") >= 14
    assert not any(tag == "svg" for tag, _ in reader.tags)
    assert "what got worse; without both models' numbers it is not known" in reader.text


def test_values_that_are_not_finite_become_dashes(tmp_path):
    def spoiled(value):
        if isinstance(value, dict):
            return {key: spoiled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoiled(item) for item in value]
        return math.nan if isinstance(value, float) else value

    numbers = spoiled(copy.deepcopy(evaluation()))
    demo_folder(tmp_path / "demo", numbers)
    metrics = tmp_path / "demo" / "hybrid" / "metrics.jsonl"
    metrics.write_text(re.sub(r'"loss_main": [\d.]+', '"loss_main": NaN', metrics.read_text(), count=50))
    reader = read(build_report(tmp_path / "demo"))
    assert not re.search(r"\bnan\b|\binf\b", reader.page, flags=re.IGNORECASE)
    assert reader.red == []


def test_a_plain_run_shows_its_curves(tmp_path):
    counts = run_folder(tmp_path / "run")
    reader = read(build_report(tmp_path / "run"))
    labels = " ".join(values["aria-label"] for tag, values in reader.tags if tag == "svg")
    for what in (
        "Loss",
        "Learning rate",
        "Norm of all gradients",
        "Training speed",
        "Tokens an expert",
    ):
        assert what in labels
    # 171 + 25 + 49 + 20 batches of 4096 tokens; the busiest expert over the last 26 steps, by hand.
    assert len(counts) == 265
    assert "1,085,440" in reader.text
    last = counts[-26:].sum(axis=0)
    assert f"layer 2 {last[1].max() / last[1].mean():.2f}x" in reader.text
    assert "Missing: hardware and versions (receipt.json)." in reader.text


def test_a_run_without_traces_or_losses_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 4096, "loss": NaN, "odd": [1]}\n')
    text = read(build_report(tmp_path)).text
    assert "Missing: loss curves (metrics.jsonl)." in text
    assert "Missing: expert loads (traces/expert_load.npz)" in text
    assert "Missing: learning rate (lr in metrics.jsonl)." in text


def test_stage_borders_without_settings_follow_the_metrics(tmp_path):
    run_folder(tmp_path / "run")
    (tmp_path / "run" / "run.toml").unlink()
    assert "Stages: 1 pretrain, 2 sft, 3 mtp." in read(build_report(tmp_path / "run")).text


def test_main_prints_the_path(tmp_path, capsys):
    (tmp_path / "run.toml").write_text('name = "x<y"\n')
    assert main(str(tmp_path)) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert "<h1>Run x&lt;y</h1>" in (tmp_path / "report.html").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "report.html",
        "run.toml",
    ]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "neither a run folder"),
        ("evaluation.json", "{", "not valid JSON"),
        ("evaluation.json", "[1]", "JSON object, not list"),
        ("metrics.jsonl", "{\n", "metrics.jsonl: a line is not valid JSON"),
        ("run.toml", "a = ", "not valid TOML"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path, file, content, message):
    if file:
        (tmp_path / file).write_text(content)
    with pytest.raises(ReportError, match=message) as caught:
        build_report(tmp_path)
    assert isinstance(caught.value, SateenError)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "report.html").exists()


def test_smoothing_and_thinning():
    # Ends keep their values, the next ones average three, the middle one five.
    assert smoothed([1.0, 2.0, 6.0, 4.0, 7.0], 2) == pytest.approx([1.0, 3.0, 4.0, 17 / 3, 7.0])
    assert smoothed([5.0], 3) == [5.0]
    line = [0.5 * i for i in range(40)]
    assert smoothed(line, 6) == pytest.approx(line)
    points = [(float(i), 2.0 * i) for i in range(1001)]
    few = thinned(points)
    assert len(few) == 334
    assert few[0] == (1.0, 2.0)
    assert thinned(points[:400]) == points[:400]
    assert [short(x) for x in (0.05, 12, 300_000, 1_200_000, 2e9)] == [
        "0.05",
        "12",
        "300k",
        "1.2M",
        "2G",
    ]


def test_chance_needs_two_standard_errors():
    assert at_chance({"accuracy": 0.0, "chance": 0.0, "n": 500})
    assert not at_chance({"accuracy": 0.002, "chance": 0.0, "n": 500})
    # sqrt(0.25 / 100) = 0.05.
    assert at_chance({"accuracy": 0.6, "chance": 0.5, "n": 100})
    assert not at_chance({"accuracy": 0.61, "chance": 0.5, "n": 100})
    assert not at_chance({"accuracy": math.nan, "chance": 0.5, "n": 100})
