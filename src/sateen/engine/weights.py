"""In which form an engine holds its weights: as stored, or packed when it loads and again at every update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sateen.checkpoint.hf import load_model
from sateen.errors import ConfigError, unknown_name
from sateen.models.decoder import Decoder
from sateen.models.lowbit import WEIGHTS, lowbit_model, packed_tensors
from sateen.models.quantize import pack_model
from sateen.ops.pages import move_to_huge_pages

FORMS = ("auto", *WEIGHTS, "fairy2")


def check_weights(weights: str) -> None:
    """Raises `ConfigError` for a form that is not there."""
    if weights not in FORMS:
        raise ConfigError(unknown_name("weights", weights, FORMS))


def serving_model(model: Decoder, weights: str, *, is_ours: bool) -> Decoder:
    """The model in one of `FORMS`, sharing the tensors that are the same; `auto` is the model itself.

    With `is_ours` nobody else has the model: its floats may go as they are packed, and move to huge pages.

    Raises:
        ConfigError: its weights cannot take that form.
    """
    if weights in WEIGHTS:
        return lowbit_model(model, weights, in_place=is_ours)
    if weights == "auto":
        if is_ours:
            move_to_huge_pages(model.parameters())
        return model
    quant = model.config.quant
    if quant is None or quant.method not in ("phase", "fairy2i"):
        have = "full-precision" if quant is None else quant.method
        raise ConfigError(
            f"weights 'fairy2' packs complex two-bit weights and this model's are {have}; convert it with "
            "`sateen convert SRC DST --weights fairy2i`, or train one with the qat stage"
        )
    return pack_model(model)


def load_serving(
    model: Decoder | str | Path, weights: str, *, dtype: str | None, device: str | None
) -> tuple[Decoder, Decoder | None]:
    """The serving model, and the one it was made from where that is the caller's.

    Args:
        model: a decoder, or what `load_model` takes.
        weights: one of `FORMS`.
        dtype, device: for loading; None for a decoder.

    Raises:
        ConfigError: a decoder with a dtype or device; see also `serving_model`.
    """
    if not isinstance(model, Decoder):
        loaded = load_model(model, dtype=dtype, device=device, may_map=False)
        return serving_model(loaded, weights, is_ours=True), None
    if dtype is not None or device is not None:
        raise ConfigError("dtype and device are for loading; this model is loaded, so convert it before")
    return serving_model(model, weights, is_ours=False), model


def new_tensors(
    model: Decoder, weights: str, trained: Decoder | None, source: Mapping[str, Tensor] | str | Path | None
) -> Mapping[str, Tensor] | str | Path | None:
    """What an update puts into a serving model, None where it has the new weights already.

    Args:
        model: from `serving_model`.
        weights: its form.
        trained: the model it was made from, where the caller may go on training it.
        source: new weights in the form of `trained` for int8 and int4, of `model` otherwise; None for those
            that `trained` has now.
    """
    if weights not in WEIGHTS:
        changed = source is None and trained is not None and trained is not model
        return pack_model(trained).state_dict() if changed and trained is not None else source
    if isinstance(source, str | Path):
        source = load_model(source, device=str(model.device)).state_dict()
    elif source is None and trained is not None:
        source = trained.state_dict()
    return None if source is None else packed_tensors(model, source)


class WeightWatch:
    """Notices changes of a model's tensors in place: a trainer may own the very same ones."""

    def __init__(self, model: Decoder):
        # Tensors made in inference mode have no version, and no trainer.
        self._tensors = [w for w in (*model.parameters(), *model.buffers()) if not w.is_inference()]
        self._seen = self._state()

    def _state(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]  # moves with every change that torch makes

    def has_changed(self) -> bool:
        """Whether some tensor changed since this was last asked."""
        before, self._seen = self._seen, self._state()
        return self._seen != before
