"""Attention kinds by the name `config.json` gives them; importing this registers all of them."""

from sateen.nn.attention.base import Attention, LayerCache, LayerLinks, Sequences
from sateen.nn.attention.full import FullAttention, SlidingAttention

__all__ = ["Attention", "FullAttention", "LayerCache", "LayerLinks", "Sequences", "SlidingAttention"]
