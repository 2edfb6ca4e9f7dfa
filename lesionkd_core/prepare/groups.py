"""What must stay together: the release's groups and near-duplicate images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd


def near_pairs(hashes: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """Pairs of images whose hashes (N, 63) differ in at most `bits` bits.

    Yields blocks (M, 3) of row i, row j > i and their distance, in bits; memory grows with N alone.
    """
    signs = hashes.astype(np.float32)
    for start in range(0, len(signs), 256):
        block = signs[start : start + 256]
        apart = block @ (1 - signs.T) + (1 - block) @ signs.T
        i, j = np.nonzero(apart <= bits)
        later = j > i + start
        yield np.stack([i + start, j, apart[i, j]], 1).astype(int)[later]


def group_cases(groups: pd.Series, hashes: np.ndarray | None, bits: int) -> list[str]:
    """Union of the release's groups and near-duplicate images -> group of every case, 'g0000', ...

    `groups` (N,) is empty text where the release does not say; without `hashes` (N, 63) (the phantom
    draws no image twice) only the release's groups count.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(groups)
    codes = pd.factorize(groups.where(groups != ""))[0]  # -1: the release does not say
    first = pd.Series(range(n)).groupby(codes).transform("first").to_numpy()
    said = np.flatnonzero(codes >= 0)
    pairs = [np.stack([said, first[said]], 1)]
    if hashes is not None:
        pairs += [block[:, :2] for block in near_pairs(hashes, bits)]
    i, j = np.concatenate(pairs).T
    _, component = connected_components(coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n)), directed=False)
    return [f"g{c:04d}" for c in component]
