"""Lists of key blocks that were recorded in one forward, used again in another."""

from __future__ import annotations

import torch
from torch import Tensor


def replayed_blocks(chosen_KTn: Tensor, forced_KTn: Tensor | None) -> Tensor:
    """The recorded lists, and the chosen ones for tokens whose recorded ones are empty; int32 [K, T, n].

    A choice by rounded scores can flip between two nearly equal blocks, and a policy gradient then belongs
    to another network than the one that sampled; repeating the choice is what MiMo-V2-Flash (arXiv
    2601.02780 §4.6) does for experts. For lists it is ours.

    Args:
        chosen_KTn: what this forward would choose.
        forced_KTn: what another one chose, -1 throughout for tokens that it never computed; None for nothing.
    """
    if forced_KTn is None:
        return chosen_KTn
    forced = forced_KTn.to(chosen_KTn)
    is_missing_T = (forced < 0).all(0).all(-1)
    return torch.where(is_missing_T[:, None], chosen_KTn, forced)
