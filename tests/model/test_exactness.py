"""Products that depend on their batch mates are found."""

import torch
from torch import nn

from pacellm.model.exactness import inexact_products


class Moody(nn.Linear):
    """Gives other bits to large batches."""

    def forward(self, rows):
        return super().forward(rows) * (1 + 1e-6 * (len(rows) > 100))


def test_sizes_that_differ_are_named():
    model = nn.Sequential(nn.Linear(64, 32), Moody(32, 16), Moody(16, 16))
    assert inexact_products(model) == [(16, 16), (32, 16)]


def test_one_thread_and_small_sizes_are_exact():
    assert torch.get_num_threads() == 1
    assert inexact_products(nn.Sequential(nn.Linear(192, 512, bias=False), nn.Linear(512, 192, bias=False))) == []
