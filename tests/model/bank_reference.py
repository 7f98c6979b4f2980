"""Persistent Activity as a plain loop over segments, the reference preset of one layer, written from the paper's
description; hooked to a down-projection of an unpatched model."""

import torch


class Loop:
    """One layer's bank, one sequence from its first token on.

    Args:
        cuts: where segments end.
    """

    def __init__(self, config, cuts):
        self.config, self.cuts = config, cuts
        self.keys, self.values, self.usage = [], [], []
        self.changed = 0

    def hook(self, module, inputs, output):
        """For ``register_forward_hook``."""
        bias = 0 if module.bias is None else module.bias
        x, y = inputs[0].flatten(0, -2), output.flatten(0, -2) - bias
        parts = [self.segment(x[a:b], y[a:b]) for a, b in zip([0, *self.cuts[:-1]], self.cuts, strict=True)]
        return (torch.cat(parts) + bias).view(output.shape)

    def segment(self, x, y):
        """[n, F], [n, H] -> [n, H]: all reads, then one write."""
        config, outputs, low, mid, touched = self.config, [], [], [], set()
        for i in range(len(x)):
            if not self.keys:
                outputs.append(y[i])
                low.append(i)
                continue
            scores = torch.nn.functional.cosine_similarity(x[i][None], torch.stack(self.keys), dim=-1)
            order = scores.argsort(descending=True, stable=True).tolist()
            best, worst = order[: config.top_k], order[-min(config.bottom_k, len(order)) :]
            near = torch.stack([self.values[j] for j in best]).mean(0)
            far = config.negative_weight * torch.stack([self.values[j] for j in worst]).mean(0)
            peak, mean = scores.max().item(), scores[best].mean().item()
            if peak > config.high:
                read = near + far
            elif peak > config.low:
                read = config.fuse_weight * near + far
            else:
                read = y[i]
            self.changed += peak > config.low
            outputs.append((1 - config.mix) * y[i] + config.mix * read)
            if mean <= config.low:
                low.append(i)
            elif mean <= config.high:
                mid.append(i)
                touched.update(best)
        for j in touched:
            self.keys[j] = (self.keys[j] + x[mid].mean(0)) / 2
            self.values[j] = (self.values[j] + torch.stack([outputs[i] for i in mid]).mean(0)) / 2
            self.usage[j] += 1
        free = list(range(len(self.keys), config.bank_size))
        filled = sorted(range(len(self.keys)), key=lambda j: (self.usage[j], j))
        for i, j in zip(low, [*free, *filled], strict=False):
            if j == len(self.keys):
                for store in (self.keys, self.values, self.usage):
                    store.append(None)
            self.keys[j], self.values[j], self.usage[j] = x[i], outputs[i], 1
        return torch.stack(outputs)
