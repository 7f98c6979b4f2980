"""Running engines on tiny models, and looking at what they leave."""

import gc
import itertools
import os

import torch

from pacellm import EngineConfig, PAConfig
from pacellm.engine.engine import Engine, run_until_idle
from pacellm.rows import ROWS
from pacellm.types import Delta, Finished, GenerationRequest, SamplingParams

# one that acts, so that a bank's content is seen in answers
BANK = PAConfig(preset="reference", bank_size=12, segment=64, theta_high=0.9, theta_low=0.5)
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


_made = itertools.count(1)


def new_engine(model, **changes):
    """An engine with small banks, that checks its bookkeeping after every step."""
    if next(_made) % 8 == 0:
        gc.collect()  # an engine and its stores refer to each other: its KV memory goes when they are found
    settings = {"kv_cache_memory": 64 * 2**20, "check_integrity": True, "bank": BANK, **changes}
    settings.setdefault("max_num_mixed_tokens", settings.get("max_num_batched_tokens", 2048))
    return Engine(model, EngineConfig(**settings))


def use_static_decode(engine):
    """Run decode steps as a GPU does, without capture: on static buffers, and before the last one's tokens are read."""
    most = engine.config.max_num_seqs
    engine.runner.use_static_decode(max_seqs=most, max_tokens=engine.config.max_model_len, capture=False)
    engine.runner.decoder._buckets = [-(-most // ROWS) * ROWS]
    return engine


def prompt(length, seed=0, vocabulary=97):
    """Random ids, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def request(name, ids, sampling=GREEDY, session=None, **changes):
    """A request, in the session of that name if one is given."""
    key = None if session is None else ("tenant", session)
    return GenerationRequest(name, ids, sampling, session=key, tenant="tenant", **changes)


def tokens(events):
    """The generated ids."""
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


def finish(events):
    """The terminal event, which must be a good one."""
    assert isinstance(events[-1], Finished), events[-1]
    return events[-1]


def run(engine, *requests):
    """All events by request id."""
    for item in requests:
        engine.add(item)
    return run_until_idle(engine)


def operate(engine, operation):
    """What a session operation gives."""
    future = engine.call(operation)
    run_until_idle(engine)
    return future.result(1)


def crash(engine):
    """The process of an engine dies, once what it has begun is on disk: the kernel lets its locks go."""
    engine.worker.finish()
    os.close(engine.mover.disk.servers._mark)


def banks(engine, session):
    """Copies of a session's bank tensors, by layer and field."""
    found = engine.sessions.get(("tenant", session))
    return {
        (layer, name): tensor.clone()
        for layer, bank in engine.pool.banks(found.row).items()
        for name, tensor in zip(bank._fields, bank, strict=True)
    }


def assert_same_banks(mine, theirs):
    """Equal to the bit."""
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def assert_nothing_held(engine):
    """No request holds anything, and what sessions hold adds up."""
    engine.parts.integrity.check()
    assert not engine.has_work
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    if engine.pool is not None:
        assert len(engine.pool._free_stages) == engine.config.max_num_seqs
