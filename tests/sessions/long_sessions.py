"""Sessions longer than their budget, and where their blocks lie."""

import dataclasses

from pacellm import PAConfig
from pacellm.engine.engine import run_until_idle
from pacellm.types import Delta, Outline, SamplingParams
from tests.engine.helpers import finish, new_engine, prompt, request

SIZES = {
    "working_memory": 2560,
    "working_memory_window": 512,
    "working_memory_recall": 1024,
    "max_model_len": 50_000,
    "bank": PAConfig(bank_size=12, segment=64),
}
READ = SamplingParams(max_tokens=0)
ANSWER = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=0)
KEY = ("tenant", "s")
LONG = prompt(4700)


def new(model, path=None, **changes):
    return new_engine(model, **{**SIZES, **({"session_dir": str(path)} if path else {}), **changes})


def turn(engine, ids, sampling=ANSWER, session="s", **changes):
    """A request's tokens with log-probabilities, and its end."""
    asked = request("x", ids, sampling, session=session, **changes)
    engine.add(dataclasses.replace(asked, outline=Outline(opening=3, question=(20, 5))))
    events = run_until_idle(engine)["x"]
    found = [(one.token_id, one.logprob) for e in events if isinstance(e, Delta) for one in e.logprobs]
    return found, finish(events)


def questions(engine, between, session="s", ids=LONG):
    """Reads beyond the budget, then asks three times; ``between`` gives the engine that goes on."""
    context, found, ends = list(ids), [], []
    turn(engine, context, READ, session)
    for number in range(3):
        engine = between(engine)
        context += prompt(200 + 301 * number, number + 1)
        answer, end = turn(engine, context, ANSWER, session)
        context += [token for token, _ in answer][:-1]
        found.append(answer)
        ends.append(end)
    return found, ends, engine


def spill(engine):
    """Everything idle leaves the device."""
    engine.prefix_cache.clear()
    while engine.eviction.evict_one():
        pass
    run_until_idle(engine)
    return engine


def files(engine, name="s"):
    return {path.name: path for path in engine.mover.disk.folder(("tenant", name)).iterdir()}


def blocks(engine, name="s"):
    return {file: path for file, path in files(engine, name).items() if file.startswith("history.")}


def unlisted(path):
    return list(path.glob("history/*/*"))


def assert_counted(engine, path):
    """What the directory holds is what is said of it, but for the heads of files that no state lists, and owners."""
    engine.worker.finish()
    held, spare = engine.mover.files.usage, 4096 * len(unlisted(path))
    found = {one.stat().st_ino: one for one in path.rglob("*.safetensors")}
    of_blocks = [one for one in found.values() if "history" in f"{one.parent.parent.name} {one.name}"]
    owners = sum(one.stat().st_size for one in path.glob("*/owner.json"))
    for told, files, more in ((held.bytes, found.values(), owners), (held.history_bytes, of_blocks, 0)):
        size = sum(one.stat().st_size for one in files)
        assert size - spare <= told <= size + more
