"""Linear layers in tiles of a fixed number of rows."""

import torch
from torch import nn

from pacellm.model.fixed_rows import TILE, fix_rows


def test_every_product_has_the_same_rows(monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(24, 12).requires_grad_(False)
    hidden = torch.randn(1, TILE + 30, 24)
    expected = layer(hidden)
    fix_rows(layer)
    fix_rows(layer)
    sizes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: sizes.append(a.shape[0]) or mm(a, b, out=out))
    torch.testing.assert_close(layer(hidden), expected)
    assert sizes == [TILE, TILE]
    assert torch.equal(layer(hidden[:, 40:41]), layer(hidden)[:, 40:41])
