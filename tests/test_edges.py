"""Label_edge against a brute-force loop, and its form for batches; the original's: test_oracles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lesionkd_core.edges import edge_at_stride, edge_label, edge_label_batch


def brute_force(mask: np.ndarray) -> np.ndarray:
    edge = np.zeros(mask.shape, bool)
    height, width = mask.shape
    for y, x in np.ndindex(height, width):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < height and 0 <= u < width and mask[v, u] != mask[y, x]:
                edge[y, x] = True
    return edge


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 5), (16, 16)])
def test_edge_equals_a_loop_over_neighbours(shape):
    for seed in range(10):
        mask = np.random.default_rng(seed).random(shape) < 0.4
        assert (edge_label(mask) == brute_force(mask)).all()


def test_width_dilates_by_the_four_neighbours():
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    distance = np.abs(np.arange(9) - 4)[:, None] + np.abs(np.arange(9) - 4)
    for width in (1, 2, 3):
        assert (edge_label(mask, width) == (distance <= width)).all()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_form_for_batches_is_the_same_rule(width):
    masks = np.random.default_rng(1).random((4, 1, 12, 10)) < 0.3
    batch = edge_label_batch(torch.from_numpy(masks).float(), width)
    assert batch.dtype == torch.float32 and (batch.numpy() == edge_label(masks, width)).all()
    if width == 1:
        assert torch.equal(batch, edge_label_batch(torch.from_numpy(masks).float()))


def test_pooling_keeps_every_edge_pixel():
    edge = torch.zeros(1, 1, 16, 16)
    edge[0, 0, 5, 11] = 1
    pooled = edge_at_stride(edge, 4)
    assert pooled.sum() == 1 and pooled[0, 0, 1, 2] == 1
    assert torch.equal(edge_at_stride(edge, 2), F.max_pool2d(edge, 2))
    assert edge_at_stride(edge, 1) is edge


@pytest.mark.fault
@pytest.mark.parametrize(
    ("mask", "words"), [(np.array([[0, 255]]), "threshold"), (np.zeros(4), "H, W")]
)
def test_an_array_that_is_no_mask_is_refused(mask, words):
    with pytest.raises(ValueError, match=words):
        edge_label(mask)
