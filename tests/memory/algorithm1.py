"""Persistent Activity as the paper's Algorithm 1 has it, token by token and slot by slot: slow, without tricks, and
what every form in ``pacellm/memory`` is held against."""

import torch
from torch.nn.functional import cosine_similarity


class Algorithm1:
    """One layer's bank of one sequence.

    Attributes:
        keys, values, usage, stamp: of the slots that are filled.
        clock: writes so far.
        counts: hits, fuses, misses, reads of an empty bank, merged slots, replaced slots.
    """

    def __init__(self, config):
        self.config, self.clock, self.counts = config, 0, [0] * 6
        self.keys, self.values, self.usage, self.stamp = [], [], [], []

    def segment(self, x, y):
        """[n, F], [n, H] -> [n, H]: all reads, then one write."""
        reads = [self._read(*token) for token in zip(x, y, strict=True)]
        self._write(x, reads)
        return torch.stack([output for output, _, _ in reads])

    def _read(self, x, y):
        """A token's output, its level (high, mid or low), and its most similar slots."""
        config = self.config
        if not self.keys:
            self.counts[3] += 1
            return y, "low", []
        scores = cosine_similarity(x[None], torch.stack(self.keys), dim=-1)
        order = scores.argsort(descending=True, stable=True).tolist()
        best, worst = order[: config.top_k], order[len(order) - min(config.bottom_k, len(order)) :]
        near = torch.stack([self.values[j] for j in best]).mean(0)
        far = torch.stack([self.values[j] for j in worst]).mean(0) if worst else torch.zeros_like(y)
        peak, mean = scores.max().item(), scores[best].mean().item()
        level = "low" if mean <= config.low else "mid" if mean <= config.high else "high"
        if peak > config.high:
            self.counts[0] += 1
            recalled = near + config.negative_weight * far
        elif peak > config.low:
            self.counts[1] += 1
            recalled = config.fuse_weight * near + config.negative_weight * far
            recalled = recalled + (1 - config.fuse_weight) * y if config.is_paper else recalled
        else:
            self.counts[2] += 1
            return y, level, best
        return (1 - config.mix) * y + config.mix * recalled, level, best

    def _write(self, x, reads):
        self.clock += 1
        config, old = self.config, list(zip(self.keys, self.values, strict=True))
        mid = [i for i, (_, level, _) in enumerate(reads) if level == "mid"]
        for _, level, best in reads:
            for j in best if level == "high" and config.is_paper else ():
                self.usage[j] += 1
        for j, (key, value) in enumerate(old):
            mine = [i for i in mid if j in reads[i][2]]
            if mine:
                merged = mine if config.is_paper else mid
                means = x[merged].mean(0), torch.stack([reads[i][0] for i in merged]).mean(0)
                self.keys[j] = config.momentum * key + (1 - config.momentum) * means[0]
                self.values[j] = config.momentum * value + (1 - config.momentum) * means[1]
                self.usage[j] += 1
                self.stamp[j] = self.clock
                self.counts[4] += 1
        low = [i for i, (_, level, _) in enumerate(reads) if level == "low"]
        for i, j in zip(low, self._order(), strict=False):
            if j == len(self.keys):
                for slots in (self.keys, self.values, self.usage, self.stamp):
                    slots.append(None)
            self.keys[j], self.values[j], self.usage[j], self.stamp[j] = x[i], reads[i][0], 1, self.clock
            self.counts[5] += 1

    def _order(self):
        """Slots as low tokens take them: free ones by index, then filled ones by use, then by age or index."""
        free = range(len(self.keys), self.config.bank_size)
        by_age = self.config.ties == "age"
        return [*free, *sorted(range(len(self.keys)), key=lambda j: (self.usage[j], self.stamp[j] if by_age else j, j))]

    def assert_holds(self, bank, **close):
        """A bank's tensors are these."""
        filled = len(self.keys)
        assert int(bank.filled) == filled
        assert int(bank.clock) == self.clock
        assert bank.usage[:filled].tolist() == self.usage
        assert bank.stamp[:filled].tolist() == self.stamp
        assert bank.counters.tolist() == self.counts
        torch.testing.assert_close(bank.keys[:filled], torch.stack(self.keys), **close)
        torch.testing.assert_close(bank.values[:filled], torch.stack(self.values), **close)
