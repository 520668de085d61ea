"""Attention kinds by the name `config.json` gives them; importing this registers all of them."""

from sateen.nn.attention.base import Attention, LayerCache, LayerLinks, Sequences
from sateen.nn.attention.complex import ComplexAttention
from sateen.nn.attention.full import FullAttention, SlidingAttention
from sateen.nn.attention.hysparse import GatedSlidingAttention, OracleAttention, SparseAttention

__all__ = [
    "Attention",
    "ComplexAttention",
    "FullAttention",
    "GatedSlidingAttention",
    "LayerCache",
    "LayerLinks",
    "OracleAttention",
    "Sequences",
    "SlidingAttention",
    "SparseAttention",
]
