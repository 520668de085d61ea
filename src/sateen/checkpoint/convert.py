"""`sateen convert SRC DST`: a stored model in another form of its weights, as a directory of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sateen.checkpoint.folder import refuse_foreign
from sateen.checkpoint.hf import DTYPES, load_model, save
from sateen.checkpoint.load import check
from sateen.checkpoint.rewrite import rewrite
from sateen.checkpoint.shards import resolve
from sateen.errors import ConfigError, unknown_name
from sateen.models.decoder import Decoder
from sateen.models.mimo_v2_flash_dialects import in_dialect, misread_by_transformers
from sateen.models.quant_config import METHODS, default_spec
from sateen.models.quantize import linear_bytes, pack_model, quantize_model, unquantize_model

log = logging.getLogger("sateen.checkpoint")

WEIGHTS = ("keep", "packed", "float", *METHODS)


def main(
    source: str,
    destination: str,
    *,
    weights: str = "keep",
    stages: int | None = None,
    activations: str | None = None,
    skip: Sequence[str] | None = None,
    dtype: str = "keep",
    dialect: str | None = None,
    mtp: str | None = None,
) -> int:
    """Prints the directory it wrote and returns the exit code.

    Where weights keep their form, tensors stream from one directory to the other; otherwise the model is
    loaded.

    Args:
        source: a model directory, a run folder or a GGUF file.
        destination: replaced when it is a model already, refused when it is anything else.
        weights, stages, activations, skip: see `convert`.
        dtype: of the tensors that stay in floating point: `float32`, `bfloat16`, `float16`, or `keep` for
            what is stored, FP8 codes and scales included.
        dialect: `hub` or `transformers`, how the config of MiMo-V2-Flash is spelt; as it is when None.
        mtp: a directory with further MTP heads of the model.
    """
    refuse_foreign(Path(destination).resolve())
    folder = resolve(source)
    _refuse_flags(weights, stages, activations, skip)
    if dtype not in ("keep", *DTYPES):
        raise ConfigError(unknown_name("--dtype", dtype, ("keep", *DTYPES)))
    if weights == "keep":
        stored = check(folder, mtp=mtp)
        rewrite(stored, Path(destination), dtype=DTYPES.get(dtype), dialect=dialect)
        config = stored.model.config if dialect is None else in_dialect(stored.model.config, dialect)
    else:
        loaded = load_model(folder, dtype=DTYPES.get(dtype), mtp=mtp)
        model = convert(loaded, weights=weights, stages=stages, activations=activations, skip=skip)
        if dialect is not None:
            model.config = in_dialect(model.config, dialect)
        if model.config.quant is not None:
            found = linear_bytes(model)
            bits = 8 * found["bytes"] / found["weights"]
            log.info(
                "%s: %d layers with %d weights take %d bytes, %.2f bits each",
                model.config.quant.method, found["layers"], found["weights"], found["bytes"], bits,
            )  # fmt: skip
        save(model, destination, carry_from=folder)
        config = model.config
    if dialect == "transformers" and config.num_mtp_heads:
        log.warning(
            "%s keeps its %d MTP heads; transformers drops them on load", destination, config.num_mtp_heads
        )
    if dialect == "hub" and (misread := misread_by_transformers(config)):
        log.warning(
            "%s: transformers would misread %s of its config; --dialect transformers writes one it reads",
            destination, ", ".join(misread),
        )  # fmt: skip
    print(destination)
    return 0


def convert(
    model: Decoder,
    *,
    weights: str = "keep",
    stages: int | None = None,
    activations: str | None = None,
    skip: Sequence[str] | None = None,
) -> Decoder:
    """The model in another form of its linear layers' weights.

    Args:
        weights: `keep` changes nothing; a quantisation method takes the weights as masters, quantised in
            every forward; `packed` stores the codes of a quantised model; `float` takes a quantisation off.
        stages: of `fairy2i`, bits per weight; the method's own number when None.
        activations: `int8` or `float`; the method's own when None.
        skip: dotted pieces of names of modules that stay as they are; `lm_head` when None.

    Raises:
        ConfigError: the model cannot take this form, or a setting belongs to another one.
    """
    _refuse_flags(weights, stages, activations, skip)
    if weights == "keep":
        return model
    if weights == "packed":
        return pack_model(model)
    if weights == "float":
        return unquantize_model(model)
    spec = default_spec(weights)
    asked = {"stages": stages, "act": activations, "skip": None if skip is None else tuple(skip)}
    return quantize_model(model, replace(spec, **{k: v for k, v in asked.items() if v is not None}))  # type: ignore[arg-type]


def _refuse_flags(
    weights: str, stages: int | None, activations: str | None, skip: Sequence[str] | None
) -> None:
    if weights not in WEIGHTS:
        raise ConfigError(unknown_name("--weights", weights, WEIGHTS))
    if stages is not None and weights != "fairy2i":
        raise ConfigError(f"--stages is for --weights fairy2i; --weights is {weights}")
    for flag, value in (("--activations", activations), ("--skip", skip)):
        if value is not None and weights not in METHODS:
            raise ConfigError(f"{flag} is for {', '.join(METHODS)}; --weights is {weights}")
