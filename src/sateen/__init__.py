"""Sateen trains, post-trains, shrinks and serves hybrid-attention language models.

The public names below load their rooms when they are first used, so `import sateen` costs no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sateen import ops, placement
    from sateen.checkpoint.hf import load_model
    from sateen.engine.engine import LLM
    from sateen.engine.request import SamplingParams

try:
    __version__ = version("sateen")
except PackageNotFoundError:  # a source tree on PYTHONPATH that was never installed
    __version__ = "0+unknown"

_NAMES = {
    "LLM": "sateen.engine.engine:LLM",
    "SamplingParams": "sateen.engine.request:SamplingParams",
    "load_model": "sateen.checkpoint.hf:load_model",
}
_ROOMS = ("ops", "placement")

__all__ = ["LLM", "SamplingParams", "__version__", "load_model", "ops", "placement"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"sateen.{name}")
    if name in _NAMES:
        return pkgutil.resolve_name(_NAMES[name])
    raise AttributeError(f"module 'sateen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
