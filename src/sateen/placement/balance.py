"""Placement of experts on ranks: copies for the hot ones, then packing, with EPLB's output tensors.

`plan(method="ours")` replicates, packs the largest first and swaps; `method="eplb"` repeats DeepSeek's EPLB
slot by slot. Copies of an expert share its load equally. Letters are in `trace.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sateen.errors import ConfigError, ShapeError, unknown_name
from sateen.placement import eplb
from sateen.placement.trace import Floats, Ints

METHODS = ("ours", "eplb")


@dataclass(frozen=True)
class PlacementPlan:
    """Which expert each physical slot holds.

    Attributes:
        phy2log_LP: int64, slot to expert; slot p lives on rank p // (P / ranks).
        log2phy_LEC: int64, expert to its slots, padded with -1; C is the largest number of copies.
        logcnt_LE: int64, copies of each expert.
        ranks: number of ranks.
        moves_L: slots whose expert was not on their rank before, per layer; None without an earlier plan.
    """

    phy2log_LP: Ints
    log2phy_LEC: Ints
    logcnt_LE: Ints
    ranks: int
    moves_L: Ints | None = None

    def shares_LEG(self) -> Floats:
        """The part of each expert's load that each rank carries; sums to 1 over ranks."""
        L, P = self.phy2log_LP.shape
        held = np.zeros((L, self.logcnt_LE.shape[1], self.ranks))
        ranks_P = np.arange(P) // (P // self.ranks)
        np.add.at(held, (np.arange(L)[:, None], self.phy2log_LP, ranks_P[None]), 1.0)
        shares: Floats = held / self.logcnt_LE[:, :, None]
        return shares

    def rank_loads(self, load: Floats) -> Floats:
        """Loads [..., L, G] of the ranks under expert loads [..., L, E]."""
        loads: Floats = np.einsum("...le,leg->...lg", load, self.shares_LEG())
        return loads


def plan(
    load_LE: Floats,
    ranks: int,
    slots: int,
    *,
    method: str = "ours",
    groups: int = 1,
    nodes: int = 1,
    previous: PlacementPlan | None = None,
) -> PlacementPlan:
    """A placement of `slots` physical experts on `ranks` ranks for these loads.

    Args:
        load_LE: non-negative loads in any unit.
        ranks: devices; divides `slots`.
        slots: all physical slots, at least one per expert.
        method: "ours", or "eplb" for EPLB's own tensors.
        groups: expert groups, for EPLB's hierarchical form.
        nodes: nodes of EPLB's hierarchical form; without `nodes` dividing `groups` it is global.
        previous: the plan in force. Ours keeps a layer where the new one is no better, and labels ranks so
            that the fewest experts move.

    Raises:
        ConfigError: numbers that do not divide, too few or too many slots, negative loads, unknown method.

    Source: EPLB (DeepSeek, MIT); largest first, swaps and relabelling are ours.
    """
    load = np.asarray(load_LE, np.float64)
    if load.ndim != 2 or 0 in load.shape:
        raise ShapeError(f"loads are {load.shape}, expected [layers, experts]")
    if not np.isfinite(load).all() or (load < 0).any():
        raise ConfigError("loads should be finite and not negative")
    _check(load.shape[1], ranks, slots, method)
    if previous is not None and (
        previous.phy2log_LP.shape != (len(load), slots)
        or previous.ranks != ranks
        or previous.logcnt_LE.shape != load.shape
    ):
        raise ShapeError(
            f"the earlier plan holds {previous.phy2log_LP.shape} slots on {previous.ranks} ranks,"
            f" this one {(len(load), slots)} on {ranks}"
        )
    if method == "eplb":
        maps = eplb.rebalance(load, slots, groups, nodes, ranks)
        return PlacementPlan(*maps, ranks, _moves(maps[0], previous))
    rows = []
    for l, load_E in enumerate(load):
        row_GK = _layer(load_E, ranks, slots)
        if previous is not None:
            old_GK = previous.phy2log_LP[l].reshape(ranks, -1)
            row_GK = old_GK if _worst(load_E, old_GK) <= _worst(load_E, row_GK) else _relabel(row_GK, old_GK)
        rows.append(row_GK.reshape(-1))
    return from_slots(np.stack(rows), load.shape[1], ranks, previous)


def contiguous(layers: int, experts: int, ranks: int, slots: int) -> PlacementPlan:
    """The placement before any balancing: experts in order, extra slots filled from expert 0 on."""
    _check(experts, ranks, slots, "ours")
    return from_slots(np.tile(np.arange(slots) % experts, (layers, 1)), experts, ranks)


def from_slots(
    phy2log_LP: Ints, experts: int, ranks: int, previous: PlacementPlan | None = None
) -> PlacementPlan:
    """The plan with these slots; the other maps follow, copies numbered by slot."""
    L, P = phy2log_LP.shape
    count = np.stack([np.bincount(row, minlength=experts) for row in phy2log_LP])
    log2phy = np.full((L, experts, int(count.max())), -1, np.int64)
    for l in range(L):
        used = np.zeros(experts, np.int64)
        for p in range(P):
            e = phy2log_LP[l, p]
            log2phy[l, e, used[e]] = p
            used[e] += 1
    return PlacementPlan(phy2log_LP.astype(np.int64), log2phy, count, ranks, _moves(phy2log_LP, previous))


def balancedness_ratio_of_sums(loads: Floats) -> float:
    """Sum of mean rank loads over sum of largest ones, of loads [..., G]; vLLM's word, closest to time."""
    return float(loads.mean(-1).sum() / loads.max(-1).sum())


def balancedness_mean_of_ratios(loads: Floats) -> float:
    """Mean of each row's mean load over its largest one, of loads [..., G]; SGLang's word, with its 1e-5."""
    return float(((loads.mean(-1) + 1e-5) / (loads.max(-1) + 1e-5)).mean())


def bound(load_LE: Floats, ranks: int) -> float:
    """The best ratio of sums without copies: one rank at least carries the hottest expert."""
    total = np.asarray(load_LE, np.float64).sum(-1)
    return float(total.sum() / np.maximum(total, ranks * np.max(load_LE, axis=-1)).sum())


def _check(experts: int, ranks: int, slots: int, method: str) -> None:
    if method not in METHODS:
        raise ConfigError(unknown_name("placement method", method, METHODS))
    if ranks < 1 or slots < experts or slots % ranks:
        raise ConfigError(
            f"{slots} slots on {ranks} ranks for {experts} experts: slots should be a multiple of ranks and"
            " at least one per expert"
        )
    if method == "ours" and slots > experts * ranks:
        raise ConfigError(
            f"{slots} slots for {experts} experts on {ranks} ranks would put two copies on one rank"
        )


def _layer(load_E: Floats, ranks: int, slots: int) -> Ints:
    """Experts [G, K] of one layer: copies, largest first, swaps; no rank holds an expert twice."""
    count = np.ones(len(load_E), np.int64)
    for _ in range(slots - len(load_E)):
        count[np.argmax(np.where(count < ranks, load_E / count, -1.0))] += 1
    each_E = load_E / count
    order = [e for e in np.argsort(-each_E, kind="stable") for _ in range(count[e])]
    held: list[list[int]] = [[] for _ in range(ranks)]
    total, K = np.zeros(ranks), slots // ranks
    for e in order:
        open_ = [g for g in range(ranks) if len(held[g]) < K]
        free = [g for g in open_ if e not in held[g]]
        if free:
            g = min(free, key=lambda rank: float(total[rank]))
        else:
            # Every open rank holds e already: an item of a full rank moves to an open one to make room.
            # K distinct items without e always hold one that an open rank with e and a gap lacks.
            to = min(open_, key=lambda rank: float(total[rank]))
            g = next(rank for rank in range(ranks) if e not in held[rank])
            item = next(i for i in held[g] if i not in held[to])
            held[g].remove(item)
            held[to].append(item)
            total[[g, to]] += np.array([-each_E[item], each_E[item]])
        held[g].append(int(e))
        total[g] += each_E[e]
    return _swap(np.array(held, np.int64), each_E)


def _swap(held_GK: Ints, each_E: Floats, limit: int = 2000) -> Ints:
    """Exchanges between the fullest rank and others until none makes both lighter than it was."""
    G = len(held_GK)
    held_by = np.zeros((len(each_E), G), bool)
    held_by[held_GK, np.arange(G)[:, None]] = True
    total = each_E[held_GK].sum(1)
    for _ in range(limit):
        g = int(total.argmax())
        gain_KGK = each_E[held_GK[g]][:, None, None] - each_E[held_GK][None]
        peak = np.maximum(total[g] - gain_KGK, total[None, :, None] + gain_KGK)
        allowed = ~held_by[held_GK[g]][:, :, None] & ~held_by[held_GK, g][None]
        peak = np.where(allowed, peak, np.inf)
        i, h, j = (int(k) for k in np.unravel_index(int(peak.argmin()), peak.shape))
        if not peak[i, h, j] < total[g] * (1 - 1e-9):
            break
        a, b = held_GK[g, i], held_GK[h, j]
        held_GK[g, i], held_GK[h, j] = b, a
        held_by[a, g] = held_by[b, h] = False
        held_by[a, h] = held_by[b, g] = True
        total[[g, h]] += np.array([-1.0, 1.0]) * gain_KGK[i, h, j]
    return held_GK


def _relabel(new_GK: Ints, old_GK: Ints) -> Ints:
    """The same sets of experts on the ranks and slots where the most of them already are."""
    from scipy.optimize import linear_sum_assignment

    common = np.array([[len(set(new) & set(old)) for old in old_GK] for new in new_GK])
    rows, columns = linear_sum_assignment(common, maximize=True)
    result = np.empty_like(new_GK)
    for new, old in zip(rows, columns, strict=True):
        stay = [e if e in new_GK[new] else -1 for e in old_GK[old]]
        seen: set[int] = set()
        for k, e in enumerate(stay):  # an earlier plan may hold an expert twice on a rank; it stays once
            stay[k] = -1 if e in seen else e
            seen.add(e)
        coming = iter([e for e in new_GK[new] if e not in stay])
        result[old] = [e if e >= 0 else next(coming) for e in stay]
    return result


def _worst(load_E: Floats, held_GK: Ints) -> float:
    each = load_E / np.bincount(held_GK.reshape(-1), minlength=len(load_E))
    return float(each[held_GK].sum(1).max())


def _moves(phy2log_LP: Ints, previous: PlacementPlan | None) -> Ints | None:
    if previous is None:
        return None
    G = previous.ranks
    rows = zip(phy2log_LP, previous.phy2log_LP, strict=True)
    return np.array(
        [
            sum(
                e not in old for new, old in zip(a.reshape(G, -1), b.reshape(G, -1), strict=True) for e in new
            )
            for a, b in rows
        ],
        np.int64,
    )
