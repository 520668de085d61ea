"""EPLB as DeepSeek published it (MIT), in numpy: the same maps, slot by slot, for loads without ties."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sateen.errors import ConfigError
from sateen.placement.trace import Floats, Ints

Singles = NDArray[np.float32]


def rebalance(load_LE: Floats, slots: int, groups: int, nodes: int, ranks: int) -> tuple[Ints, Ints, Ints]:
    """Slot to expert [L, P], expert to slots [L, E, C] padded with -1, and copies [L, E].

    Hierarchical when `nodes` divides `groups`: groups are packed to nodes, experts copied inside a node,
    slots packed to its ranks. Otherwise one group on one node. Two copies may share a rank.

    Raises:
        ConfigError: groups do not divide the experts, nodes the ranks, or ranks the slots.
    """
    L, E = load_LE.shape
    if min(groups, nodes) < 1 or E % groups or ranks % nodes or slots % ranks:
        raise ConfigError(
            f"EPLB: {groups} groups should divide {E} experts, {nodes} nodes {ranks} ranks, ranks"
            f" {slots} slots"
        )
    if groups % nodes:
        groups = nodes = 1
    # float32 as in the original: sums and quotients round the same way.
    weight = load_LE.astype(np.float32)
    size, per_node = E // groups, groups // nodes
    pack, place = _pack(weight.reshape(L, groups, size).sum(-1), nodes)
    first = (pack * per_node + place) * size
    log2mlog = (first[:, :, None] + np.arange(size)).reshape(L, E)
    mlog2log = np.argsort(log2mlog, axis=1)
    local = np.take_along_axis(weight, mlog2log, 1).reshape(L * nodes, E // nodes)
    phy2mlog, copy, count = _replicate(local, slots // nodes)
    each: Singles = (local / count.astype(np.float32)).astype(np.float32)
    pack, place = _pack(np.take_along_axis(each, phy2mlog, 1), ranks // nodes)
    order = np.argsort(pack * (slots // ranks) + place, axis=1)
    inside = np.take_along_axis(phy2mlog, order, 1).reshape(L, nodes, -1)
    mlog = (inside + np.arange(0, E, E // nodes)[None, :, None]).reshape(L, slots)
    phy2log = np.take_along_axis(mlog2log, mlog, 1)
    copy = np.take_along_axis(copy, order, 1).reshape(L, slots)
    logcnt = np.take_along_axis(count.reshape(L, E), log2mlog, 1)
    log2phy = np.full((L, E, int(logcnt.max())), -1, np.int64)
    log2phy[np.arange(L)[:, None], phy2log, copy] = np.arange(slots)
    return phy2log, log2phy, logcnt


def _pack(weight: Singles, packs: int) -> tuple[Ints, Ints]:
    """Pack and place of each item, equal counts: largest first into the lightest pack with room."""
    rows, items = weight.shape
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64)
    pack, place = np.zeros((rows, items), np.int64), np.zeros((rows, items), np.int64)
    for row in range(rows):
        total, used = [0.0] * packs, [0] * packs
        for item in np.argsort(-weight[row], kind="stable"):
            target = min((p for p in range(packs) if used[p] < room), key=total.__getitem__)
            pack[row, item], place[row, item] = target, used[target]
            total[target] += float(weight[row, item])
            used[target] += 1
    return pack, place


def _replicate(weight: Singles, slots: int) -> tuple[Ints, Ints, Ints]:
    """Item of each slot, its copy number, and copies per item: each extra slot to the heaviest copy."""
    rows, items = weight.shape
    item = np.tile(np.arange(slots), (rows, 1))
    copy, count = np.zeros((rows, slots), np.int64), np.ones((rows, items), np.int64)
    each = np.arange(rows)
    for slot in range(items, slots):
        hottest = (weight / count.astype(np.float32)).argmax(-1)
        item[:, slot], copy[:, slot] = hottest, count[each, hottest]
        count[each, hottest] += 1
    return item, copy, count
