"""Cases worth showing, and what becomes of their edge labels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from ..config import EdgeConfig
from ..edges import edge_at_stride, edge_label
from ..losses import EdgeGraph
from ..networks import stride_of
from ..prepare import Prepared, near_pairs


def spread_of_cases(prepared: Prepared, split: str, count: int) -> list[int]:
    """Rows of a split from its smallest to its largest lesion, evenly spread: chosen by size, not by score."""
    rows = prepared.index(split)
    by_size = rows[np.argsort(prepared.cases["lesion_share"].to_numpy()[rows], kind="stable")]
    places = np.linspace(0, len(by_size) - 1, min(count, len(by_size))).round().astype(int)
    chosen: list[int] = by_size[places].tolist()
    return chosen


def cases_of_each_label(prepared: Prepared, count: int) -> list[int]:
    """Up to `count` rows of every label (all rows are one, where the release names none), evenly spread over lesion size."""
    order = prepared.cases.sort_values("lesion_share", kind="stable")
    tables = [table.index for _, table in order.groupby("label")]
    return [int(rows[k]) for rows in tables for k in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]


def example_pairs(prepared: Prepared, bits: int, count: int) -> pd.DataFrame:
    """Pairs of images around the threshold of near-duplicates: the `count` least alike within it, the `count` most alike beyond.

    Columns first, second (rows of `prepared`), bits (distance of the hashes).
    """
    found = np.concatenate([*near_pairs(prepared.hashes, bits + 8)])
    if not (found[:, 2] > bits).any():  # few images, all unlike
        found = np.concatenate([*near_pairs(prepared.hashes, 63)])
    table = pd.DataFrame(found, columns=["first", "second", "bits"]).sort_values("bits", kind="stable")
    within = table["bits"] <= bits
    return pd.concat([table[within].tail(count), table[~within].head(count)], ignore_index=True)


def edge_pyramid(masks: np.ndarray, width: int, strides: tuple[int, ...] = (1, 2, 4, 8, 16)) -> dict[str, np.ndarray]:
    """Masks (N, S, S) 0/1 -> edge labels at every stride, max-pooled: {'1:4': (N, S / 4, S / 4)}."""
    full = torch.from_numpy(edge_label(masks, width)).float().unsqueeze(1)
    return {f"1:{stride}": edge_at_stride(full, stride)[:, 0].numpy() for stride in strides}


def edge_survival(masks: np.ndarray, width: int, strides: tuple[int, ...] = (2, 4, 8, 16)) -> pd.DataFrame:
    """How much of the edge label is left at a stride by maximum, mean and nearest pixel.

    Parameters
    ----------
    masks : (N, S, S) 0/1
        Only masks with an edge count.

    Returns
    -------
    DataFrame
        stride, method, kept (share of the full-size edge pixels that lie in a marked cell), marked
        (share of cells marked over share of pixels on the edge), edge lost (lesions without any).
        A mean marks a cell where over half of it is edge.
    """
    full = torch.from_numpy(edge_label(masks, width)).float().unsqueeze(1)
    full = full[full.flatten(1).amax(1) > 0]
    rows = []
    for stride in strides:
        middle = stride // 2
        for method, small in {
            "max": edge_at_stride(full, stride), "mean": (F.avg_pool2d(full, stride) > 0.5).float(), "nearest": full[..., middle::stride, middle::stride],
        }.items():
            back = small.repeat_interleave(stride, -2).repeat_interleave(stride, -1)
            rows.append({
                "stride": stride, "method": method, "kept": float((full * back).sum() / full.sum()), "marked": float(small.mean() / full.mean()),
                "edge lost": int((small.flatten(1).amax(1) == 0).sum()),
            })
    return pd.DataFrame(rows)


def edge_views(cfg: EdgeConfig, masks: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Masks (N, S, S) 0/1 -> edge labels at full size and at the graph's stride, and live nodes of each case (N,)."""
    stride = stride_of(cfg.edge_level.partition(":")[0])
    full = edge_label(masks, cfg.edge_width)
    graph = EdgeGraph(1, 1, cfg.grid, frame=cfg.grid_frame)
    edge = graph.edge_at(torch.from_numpy(full).float().unsqueeze(1), stride)
    live = graph.live_nodes(edge).sum(1).numpy()
    return {"edge, 1:1": full, f"edge at stride {stride}": edge[:, 0].numpy()}, live
