"""Making room for a session's state never takes that state."""

import pytest

from pacellm.engine.engine import run_until_idle
from pacellm.model.load import prepare
from tests.engine.helpers import finish, new_engine, operate, prompt, request, run
from tests.models import tiny


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("llama"))


def ask(engine, name, ids):
    return finish(run(engine, request(name, ids, session=name))[name])


@pytest.mark.parametrize("where", ["disk", "host"])
def test_what_leaves_the_device_for_a_fork_does_not_push_its_source_out_of_the_tier_below(model, tmp_path, where):
    below = (
        {"session_dir": str(tmp_path), "session_host_memory": 0} if where == "disk" else {"session_host_memory": 2**24}
    )
    engine = new_engine(model, kv_cache_memory=4 * 512 * model.bytes_per_token, max_model_len=1500, **below)
    source, other = prompt(900, 1), prompt(700, 2)
    ask(engine, "source", source)
    while engine.eviction.evict_one():
        run_until_idle(engine)
    ask(engine, "other", other)
    if where == "disk":
        engine.mover.files.budget.limit = engine.mover.files.usage.bytes + 4096
    else:
        engine.mover.host.capacity = engine.mover.host.bytes + 4096
    operate(engine, engine.ops.fork(("tenant", "source"), ("tenant", "fork"), None))
    assert not engine.faults.counts
    assert ask(engine, "fork", source).session == "resident"
