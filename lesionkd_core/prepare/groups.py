"""What must stay together: the release's groups and near-duplicate images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd


def near_pairs(hashes: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """Pairs of images whose hashes (N, 63) differ in at most `bits` bits.

    Yields blocks (M, 3) of row i, row j > i and their distance, in bits. A hash without any bit (a flat
    image, a slice of a volume) is like nothing.
    """
    yield np.empty((0, 3), int)  # where nothing can be compared, as in volumes
    rows = np.flatnonzero(hashes.any(1))
    signs = hashes[rows].astype(np.float32)
    for start in range(0, len(signs), 256):  # a block of rows, so that memory grows with N alone
        block = signs[start : start + 256]
        apart = block @ (1 - signs.T) + (1 - block) @ signs.T
        i, j = np.nonzero(apart <= bits)
        later = j > i + start
        yield np.stack([rows[i + start], rows[j], apart[i, j]], 1).astype(int)[later]


def group_cases(groups: pd.Series, hashes: np.ndarray | None, bits: int) -> list[str]:
    """Union of the release's groups and near-duplicate images -> group of every case, 'g0000', ...

    `groups` (N,) is empty text where the release does not say; without `hashes` (N, 63) (the phantom
    draws no image twice) only the release's groups count.
    """
    codes = pd.factorize(groups.where(groups != ""))[0]  # -1: the release does not say
    first = pd.Series(range(len(groups))).groupby(codes).transform("first").to_numpy()
    component = np.where(codes >= 0, first, np.arange(len(groups)))
    for block in near_pairs(hashes, bits) if hashes is not None else ():
        component = _united(component, block[:, 0], block[:, 1])
    return [f"g{c:04d}" for c in pd.factorize(component)[0]]


def _united(component: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Components (N,) after rows i and j have been joined, pair by pair."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(component)
    joined: np.ndarray = connected_components(coo_matrix((np.ones(len(i)), (component[i], component[j])), shape=(n, n)), directed=False)[1][component]
    return joined
