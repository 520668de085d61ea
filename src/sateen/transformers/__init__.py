"""`import sateen.transformers`: our model types in transformers' AutoConfig and AutoModelForCausalLM.

The types are those of `models.registry` that transformers has no class for. A type it knows (llama, qwen2,
mimo_v2_flash, ...) stays its own unless `register` is called with its name. The classes wrap a `Decoder`: one
forward, one loader, so that MTP heads and routers survive.

MiMo-Audio is not registered: its inputs are no rectangle of token ids. `sateen.LLM` is the faster way to
generate: it has paged caches and drafts with the MTP heads.
"""

from __future__ import annotations

from sateen.errors import BackendUnavailable

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise BackendUnavailable(
        f"sateen.transformers needs transformers 5.23 or newer ({error}): pip install 'sateen[transformers]'"
    ) from None

from sateen.transformers.config import SateenConfig
from sateen.transformers.model import SateenForCausalLM
from sateen.transformers.register import register, register_missing

register_missing()

__all__ = ["SateenConfig", "SateenForCausalLM", "register"]
