"""Label_edge: where a mask's label changes (METHOD, Label_edge)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def edge_label(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Mark the pixels whose label differs from one of their 4 neighbours.

    Parameters
    ----------
    mask : (..., H, W)
        bool or 0/1.
    width : int
        1 is the rule itself, a line two pixels wide; w dilates it w - 1 times by one pixel.

    Returns
    -------
    (..., H, W) bool
        Both sides of the border; neighbours outside the image do not count.

    Examples
    --------
    >>> mask = np.zeros((4, 5), bool)
    >>> mask[1:, 3:] = True
    >>> edge_label(mask).astype(int)
    array([[0, 0, 0, 1, 1],
           [0, 0, 1, 1, 1],
           [0, 0, 1, 1, 0],
           [0, 0, 1, 1, 0]])

    Source: METHOD, Label_edge; the original's edge rule is in tests/oracles.
    """
    mask = np.asarray(mask)
    if mask.ndim < 2:
        raise ValueError(f"edge_label: mask has shape {mask.shape}; wants (..., H, W)")
    if mask.dtype != bool:
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("edge_label: mask holds values other than 0 and 1; threshold it first")
        mask = mask.astype(bool)
    edge = np.zeros(mask.shape, dtype=bool)
    down = mask[..., 1:, :] != mask[..., :-1, :]
    right = mask[..., 1:] != mask[..., :-1]
    edge[..., 1:, :] |= down
    edge[..., :-1, :] |= down
    edge[..., 1:] |= right
    edge[..., :-1] |= right
    for _ in range(width - 1):
        edge = _dilate(edge)
    return edge


def _dilate(edge: np.ndarray) -> np.ndarray:
    """Add the 4 neighbours."""
    wider = edge.copy()
    wider[..., 1:, :] |= edge[..., :-1, :]
    wider[..., :-1, :] |= edge[..., 1:, :]
    wider[..., 1:] |= edge[..., :-1]
    wider[..., :-1] |= edge[..., 1:]
    return wider


def edge_label_batch(masks: Tensor, width: int = 1) -> Tensor:
    """The same rule on augmented masks where they lie: (N, 1, H, W) float 0/1 -> same."""
    import torch
    import torch.nn.functional as F

    label = masks > 0.5
    edge = torch.zeros_like(label)
    for axis in (-2, -1):
        step = label.diff(dim=axis)  # on bool: exclusive or
        pad = (0, 0, 0, 1) if axis == -2 else (0, 1)
        behind = (0, 0, 1, 0) if axis == -2 else (1, 0)
        edge |= F.pad(step, pad) | F.pad(step, behind)
    edge = edge.float()
    for _ in range(width - 1):
        edge = torch.maximum(F.max_pool2d(edge, (3, 1), 1, (1, 0)), F.max_pool2d(edge, (1, 3), 1, (0, 1)))
    return edge


def edge_at_stride(edge: Tensor, stride: int) -> Tensor:
    """Bring a full-size edge to a feature map's resolution by max pooling (nearest or mean would lose it).

    (N, 1, H, W) -> (N, 1, H / stride, W / stride)
    """
    import torch.nn.functional as F

    return F.max_pool2d(edge, stride) if stride > 1 else edge
