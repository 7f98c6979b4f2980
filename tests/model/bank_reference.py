"""Algorithm 1 hooked to a down-projection of an unpatched model."""

import torch

from tests.memory.algorithm1 import Algorithm1


class Loop(Algorithm1):
    """One layer's bank, one sequence from its first token on.

    Args:
        cuts: where segments end.
    """

    def __init__(self, config, cuts):
        super().__init__(config)
        self.cuts = cuts

    @property
    def changed(self):
        """Tokens whose output is not the plain one."""
        return sum(self.counts[:2])

    def hook(self, module, inputs, output):
        """For ``register_forward_hook``."""
        bias = 0 if module.bias is None else module.bias
        x, y = inputs[0].flatten(0, -2), output.flatten(0, -2) - bias
        parts = [self.segment(x[a:b], y[a:b]) for a, b in zip([0, *self.cuts[:-1]], self.cuts, strict=True)]
        return (torch.cat(parts) + bias).view(output.shape)
