"""What a bank does to an answer: logits under a forced answer, with one bank or another in place.

A probe continues a session's committed state in a single step. Its answer tokens are segments of one, as if they had
been decoded, so logits are those of greedy decoding to the bit wherever the greedy answer is the forced one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from pacellm.engine.engine import Engine
from pacellm.engine.sequence import Sequence
from pacellm.llm import TENANT
from pacellm.memory.state import Banks
from pacellm.modes import PAChoice
from pacellm.run import batch
from pacellm.types import GenerationRequest


class Probe:
    """Forced answers on the sessions of an idle engine.

    Args:
        engine: with PA, used by nobody else meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def logprobs(
        self, prompt: list[int], answer: list[int], session: str, pa: PAChoice = "on", density: float | None = None
    ) -> Tensor:
        """[A, V] float64 log-probabilities at each token of ``answer`` [A] behind ``prompt``; the session stays.

        Args:
            density: part of the experts that the answer uses; None is the engine's.
        """
        engine, scheduler = self.engine, self.engine.scheduler
        request = GenerationRequest("probe", prompt, session=(TENANT, session), pa=pa, commit=False, ce_density=density)
        sequence = Sequence(
            request, array("i", prompt), max_tokens=len(answer) + 1, seed=0, generated=list(answer[:-1])
        )
        scheduler.add(sequence)
        step = scheduler.schedule()
        try:
            if step is None or step.num_tokens != sequence.pending:
                raise ValueError("a probe must fit into one step; raise max_num_batched_tokens")
            packed = batch.build(step, engine.pool, engine.config.bank.segment, engine.model.device, engine.runner.rows)
            rows = list(range(step.num_tokens - len(answer), step.num_tokens))
            return engine.runner.forward(step, packed, rows).double().log_softmax(-1)
        finally:
            scheduler.remove(sequence)
            scheduler.queues.take_admitted()

    def banks(self, session: str) -> Banks:
        """A session's committed banks; changing the tensors changes the session."""
        found = self.engine.sessions.get((TENANT, session))
        if found is None or found.row is None or self.engine.pool is None:
            raise ValueError(f"session {session!r} has no banks in place")
        return self.engine.pool.banks(found.row)


def copies(banks: Banks) -> Banks:
    """Copies of banks."""
    return {layer: type(bank)(*(tensor.clone() for tensor in bank)) for layer, bank in banks.items()}


def overwrite(banks: Banks, others: Banks) -> None:
    """Put other banks in the place of a session's."""
    for layer, bank in banks.items():
        bank.copy_(others[layer])


def emptied(banks: Banks) -> Banks:
    """Banks of the same shapes with nothing in them."""
    found = copies(banks)
    for bank in found.values():
        bank.clear()
    return found


def with_random_values(banks: Banks, seed: int) -> Banks:
    """The same keys with values of random directions and the same lengths: reads hit as before and bring noise."""
    generator, found = torch.Generator().manual_seed(seed), copies(banks)
    for bank in found.values():
        noise = torch.randn(bank.values.shape, generator=generator).to(bank.values)
        lengths = bank.values.norm(dim=1, keepdim=True)
        bank.values.copy_(noise / noise.norm(dim=1, keepdim=True) * lengths)
    return found


def divergence(own: Tensor, others: Iterable[Tensor]) -> list[float]:
    """Mean KL(own ‖ other) in nats per answer token, for [A, V] log-probabilities."""
    return [float((own.exp() * (own - other)).sum(-1).mean()) for other in others]
