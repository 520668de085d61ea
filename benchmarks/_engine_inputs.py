"""What `engine.py` feeds to every engine: one model in several files, prompts, held-out text, shapes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from _gguf import rewrite

# Modules with code and prose, no tables; with licences they are the held-out text.
MODULES = ("argparse.py", "textwrap.py", "fractions.py", "statistics.py", "sched.py")
LICENCES = ("/usr/share/common-licenses/GPL-3", "/usr/share/common-licenses/Apache-2.0")
CHARACTERS = 12_000  # of each file


@dataclass(frozen=True)
class Files:
    """One model, read by every engine.

    Attributes:
        folder: bfloat16 in Hugging Face's layout, from the dequantised blocks.
        f16: the same numbers as GGUF.
        q8_0: the same numbers in blocks of 8 bits.
        shipped: the file that was given.
        sha256: of that file.
    """

    folder: Path
    f16: Path
    q8_0: Path
    shipped: Path
    sha256: str


def prepare(gguf: Path, work: Path) -> Files:
    """Writes what is not in the work folder yet; that folder may be deleted at any time."""
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    place = work / digest[:12]
    place.mkdir(parents=True, exist_ok=True)
    files = Files(place / "bf16", place / "f16.gguf", place / "q8_0.gguf", gguf, digest)
    if not (files.folder / "config.json").is_file():
        words = [sys.executable, "-m", "sateen.cli", "convert", gguf, files.folder, "--dtype", "bfloat16"]
        subprocess.run([str(word) for word in words], check=True, stdout=sys.stderr)
    for target, matrices in ((files.f16, "F16"), (files.q8_0, "Q8_0")):
        if not target.is_file():
            partial = target.with_suffix(".partial")
            rewrite(gguf, partial, matrices)
            partial.replace(target)
    return files


class Prompts:
    """Prompts of any length that no two rounds share, from the help topics every Python has."""

    def __init__(self, tokenizer_file: Path):
        from tokenizers import Tokenizer

        topics: dict[str, str] = import_module("pydoc_data.topics").topics
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._ids: list[int] = self.tokenizer.encode("\n".join(topics[name] for name in sorted(topics))).ids
        self._next = 0

    def take(self, length: int) -> list[int]:
        """The next tokens of the text, from its beginning again when it ends."""
        if self._next + length > len(self._ids):
            self._next = 0
        self._next += length
        found = self._ids[self._next - length : self._next]
        assert len(found) == length, f"the text has {len(self._ids)} tokens"
        return found

    def text(self, length: int) -> str:
        """The same as text; it may have a few tokens more or less."""
        return str(self.tokenizer.decode(self.take(length)))


def held_out() -> dict[str, str]:
    """Name -> text of this Python's own sources and of licences; a file that is not there is left out."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / name for name in MODULES] + [Path(name) for name in LICENCES]
    return {file.name: file.read_text(encoding="utf-8")[:CHARACTERS] for file in files if file.is_file()}


def hybrid_shapes(folder: Path, context: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configs of the model's shape: five layers of window 128 to one of full attention, and all full."""
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if key not in ("architectures", "dtype")}
    raw |= {"max_position_embeddings": context}
    kinds = [
        "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(raw["num_hidden_layers"])
    ]
    hybrid = raw | {"model_type": "mistral", "sliding_window": 128, "layer_types": kinds}
    return hybrid, raw


def kv_formula(raw: dict[str, Any], context: int, num_seqs: int, number_bytes: int = 2) -> int:
    """Bytes of keys and values: every token in full layers, the window in the others."""
    kinds = raw.get("layer_types") or ["full_attention"] * raw["num_hidden_layers"]
    rows = sum(context if kind == "full_attention" else min(context, raw["sliding_window"]) for kind in kinds)
    return num_seqs * rows * int(raw["num_key_value_heads"]) * 2 * int(raw["head_dim"]) * number_bytes
