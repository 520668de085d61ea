"""What a user may trip over in a model's files: a line each, for `sateen inspect`.

The config's own traps are in `models.traps`. Only headers, JSON and the tokenizer are read, and the codes of
one FP8 weight where its scales can be read in several ways.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sateen.checkpoint import fp8
from sateen.checkpoint.gguf import gguf_bytes, is_gguf, load_gguf_tokenizer
from sateen.checkpoint.gguf_config import rotated_heads
from sateen.checkpoint.gguf_file import read_gguf
from sateen.checkpoint.load import Stored
from sateen.checkpoint.shards import FLOATS
from sateen.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from sateen.data.tokenizer import Tokenizer

SLOW = ("vocab.json", "tokenizer.model")


def file_notes(stored: Stored) -> list[str]:
    """The lines that apply to a model directory or GGUF file."""
    around = _gguf if is_gguf(stored.folder) else _texts
    return [*around(stored.folder, stored), *_tensors(stored)]


def _gguf(file: Path, stored: Stored) -> Iterator[str]:
    kinds = {kind for kind, _ in gguf_bytes(file).values()}
    if blocks := sorted(kinds - set(FLOATS)):
        yield f"blocks of {', '.join(blocks)} become floats at loading; memory is that of the floats"
    if rotated_heads(read_gguf(file)):
        yield "rows of q and k are stored in the order of rotations by pairs; loading puts them back"
    try:
        tokenizer = load_gguf_tokenizer(file)
    except ConfigError as error:
        yield f"the tokenizer is not usable: {error}"
    else:
        yield from _tokenizer(tokenizer, stored)


def _texts(folder: Path, stored: Stored) -> Iterator[str]:
    """Tokenizer, chat template and end tokens of a directory."""
    from sateen.data.tokenizer import Tokenizer

    ends: dict[str, set[int]] = {}
    if named := _ids(stored.raw.get("eos_token_id")):
        ends["config.json"] = named
    if not (folder / "tokenizer.json").is_file() and any((folder / name).is_file() for name in SLOW):
        yield "no tokenizer.json here, only the files of a slow tokenizer, which are carried but not read"
    elif not (folder / "tokenizer.json").is_file():
        yield from _tokenizer(None, stored)
    else:
        try:
            tokenizer = Tokenizer.load(folder)
            ends["tokenizer_config.json"] = {tokenizer.eos_id}
        except (CheckpointError, ConfigError) as error:
            yield f"the tokenizer is not usable: {error}"
        else:
            yield from _tokenizer(tokenizer, stored)
    if not (folder / "generation_config.json").is_file():
        yield "no generation_config.json here: other programs take their own sampling values"
    elif found := _ids(_read(folder / "generation_config.json").get("eos_token_id")):
        ends["generation_config.json"] = found
    if len(set(map(frozenset, ends.values()))) > 1:
        listed = ", ".join(f"{sorted(ids)} in {name}" for name, ids in ends.items())
        yield f"end tokens differ: {listed}; ours end at those of config.json and of the tokenizer"


def _tokenizer(tokenizer: Tokenizer | None, stored: Stored) -> Iterator[str]:
    if tokenizer is None:
        yield "no tokenizer here: prompts are token ids"
        return
    padding = stored.model.config.vocab_size - tokenizer.vocab_size
    if padding > 0:
        yield f"{padding} rows of the vocabulary have no token; sampling leaves them out"
    elif padding < 0:
        yield f"the tokenizer has {-padding} tokens more than the vocabulary: they cannot be embedded"
    if tokenizer.config.get("chat_template") is None:
        yield "no chat template here: chat needs one, plain prompts do not"


def _tensors(stored: Stored) -> Iterator[str]:
    """Dtypes, repeated matrices and the tilings of FP8 scales."""
    kinds: Counter[str] = Counter()
    routers = set()
    for key in stored.files.where:
        dtype, _ = stored.files.describe(key)
        if ".mlp.gate." in key:
            routers.add(dtype)
        else:
            kinds[dtype] += 1
    floats = {dtype: count for dtype, count in kinds.items() if dtype in FLOATS}
    if len(floats) > 1 and not is_gguf(stored.folder):
        listed = ", ".join(f"{count} {dtype}" for dtype, count in sorted(floats.items()))
        yield f"tensors have several dtypes ({listed}); loading keeps them unless a dtype is asked for"
    if routers - {"F32"}:
        yield f"routers are stored as {', '.join(sorted(routers))}; the release keeps them in F32"
    yield from _scales(stored)


def _scales(stored: Stored) -> Iterator[str]:
    if not stored.scales:
        return
    yield f"{len(stored.scales)} weights are FP8 blocks; loading makes them bfloat16 or the dtype asked for"
    uneven: dict[tuple[int, int], list[str]] = {}
    for key in stored.files.where:
        if key in stored.scales:
            rows, scale_rows = stored.files.describe(key)[1][0], stored.scales.shape(key)[0]
            if scale_rows != -(-rows // fp8.BLOCK):
                uneven.setdefault((rows, scale_rows), []).append(key)
    for (rows, scale_rows), keys in uneven.items():
        key, head_dim = keys[0], stored.head_dim(keys[0])
        try:
            reading = fp8.choose_reading(key, stored.files.copied(key), scale_rows, head_dim)
        except CheckpointError as error:
            yield str(error)
            continue
        yield (
            f"{len(keys)} weights of {rows} rows have {scale_rows} rows of scales instead of "
            f"{-(-rows // fp8.BLOCK)}; the codes of {key} say that they are read by {reading}"
        )


def _ids(value: Any) -> set[int]:
    return set(value) if isinstance(value, list) else set() if value is None else {value}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: a JSON object is expected")
    return found
