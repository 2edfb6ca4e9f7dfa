"""Label_edge: the pixels at which a mask's label changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def edge_label(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Mark the pixels whose label differs from that of one of their 4 neighbours.

    Parameters
    ----------
    mask : (..., H, W)
        bool or 0/1.
    width : int
        1 marks both sides of the border, two pixels in all; w dilates that w - 1 times by a pixel.

    Returns
    -------
    (..., H, W) bool
        Neighbours outside the image do not count.

    Examples
    --------
    >>> mask = np.zeros((4, 5), bool)
    >>> mask[1:, 3:] = True
    >>> edge_label(mask).astype(int)
    array([[0, 0, 0, 1, 1],
           [0, 0, 1, 1, 1],
           [0, 0, 1, 1, 0],
           [0, 0, 1, 1, 0]])

    Source: the 4-neighbour rule of the patent's step S4; see docs/method.md.
    """
    mask = np.asarray(mask)
    if mask.ndim < 2:
        raise ValueError(f"edge_label: mask has shape {mask.shape}; expected (..., H, W)")
    if mask.dtype != bool:
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("edge_label: mask has values other than 0 and 1; threshold it first")
        mask = mask.astype(bool)
    edge = np.zeros(mask.shape, dtype=bool)
    down = mask[..., 1:, :] != mask[..., :-1, :]
    right = mask[..., 1:] != mask[..., :-1]
    edge[..., 1:, :] |= down
    edge[..., :-1, :] |= down
    edge[..., 1:] |= right
    edge[..., :-1] |= right
    for _ in range(width - 1):
        wider = edge.copy()
        wider[..., 1:, :] |= edge[..., :-1, :]
        wider[..., :-1, :] |= edge[..., 1:, :]
        wider[..., 1:] |= edge[..., :-1]
        wider[..., :-1] |= edge[..., 1:]
        edge = wider
    return edge


def edge_label_batch(masks: Tensor, width: int = 1) -> Tensor:
    """`edge_label` of augmented masks on their device: (N, 1, H, W) float 0/1 -> the same."""
    import torch
    import torch.nn.functional as F

    label = masks > 0.5
    edge = torch.zeros_like(label)
    for axis, before, behind in ((-2, (0, 0, 0, 1), (0, 0, 1, 0)), (-1, (0, 1), (1, 0))):
        change = label.diff(dim=axis)  # of bool: exclusive or
        edge |= F.pad(change, before) | F.pad(change, behind)
    edge = edge.float()
    for _ in range(width - 1):
        across, down = F.max_pool2d(edge, (1, 3), 1, (0, 1)), F.max_pool2d(edge, (3, 1), 1, (1, 0))
        edge = torch.maximum(across, down)
    return edge


def edge_at_stride(edge: Tensor, stride: int) -> Tensor:
    """Max-pool a full-size edge to a feature map's size; mean or nearest would lose thin edges.

    (N, 1, H, W) -> (N, 1, H / stride, W / stride)
    """
    import torch.nn.functional as F

    return F.max_pool2d(edge, stride) if stride > 1 else edge
