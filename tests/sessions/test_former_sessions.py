"""Session directories written when a server had one preset for all turns and fingerprints told which: they open, and
their turns are computed as they were.

``tests/data/sessions_before_modes`` was written by that version: the bundled model, banks of 6 slots, segments of 16,
one directory for each preset; in each a session of four turns, asked ``on``, ``off``, ``read_only``, ``on``.
"""

import shutil
from pathlib import Path

import pytest
import torch

from pacellm import PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.errors import SnapshotRefused
from pacellm.model.load import load
from pacellm.sessions import format as snapshot
from pacellm.sessions.disk import LOG, STATE
from tests.engine.helpers import banks, finish, new_engine, prompt, request, run, tokens

DATA = Path(__file__).parent.parent / "data" / "sessions_before_modes"
BANK = PAConfig(bank_size=6, segment=16)
MODES = ["{}", "off", "{}_read_only", "{}"]
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # another machine's kernels round otherwise


@pytest.fixture(scope="module")
def model():
    return load(MODEL_PATH)


@pytest.fixture(params=["reference", "paper"])
def preset(request):
    return request.param


@pytest.fixture
def directory(preset, tmp_path):
    return shutil.copytree(DATA / preset, tmp_path / preset)


def engine_of(model, directory, **changes):
    return new_engine(model, **{"bank": BANK, "session_dir": str(directory), "kv_cache_memory": 2**26, **changes})


def stored(directory):
    """(log, state) as bytes lie there: tensors by name."""
    files = [next(directory.glob(f"*/{name}")).read_bytes() for name in (LOG, STATE)]
    return [snapshot.parse(memoryview(bytearray(data))).tensors for data in files]


def continued(engine, log):
    """Banks and answer after one more turn, and how the session was found."""
    ids, context, at = log["ids"].tolist(), [], 0
    for start, _, count in log["turns"][:, :3].tolist():
        context[start:] = ids[at : at + count]
        at += count
    events = run(engine, request("x", [*context, *prompt(20, 7, 400)], session="s", pa="off"))["x"]
    return finish(events).session, tokens(events), banks(engine, "s")


def test_it_opens_and_its_turns_are_replayed_as_they_were_computed(model, preset, directory):
    log, state = stored(directory)
    engine = engine_of(model, directory)
    restored, answer, mine = continued(engine, log)
    assert restored == "restored"
    session = engine.sessions.get(("tenant", "s"))
    assert [turn.pa for turn in session.log] == [*(mode.format(preset) for mode in MODES), "off"]
    engine.close()

    shutil.rmtree(directory)
    shutil.copytree(DATA / preset, directory)
    next(directory.glob(f"*/{STATE}")).unlink()
    engine = engine_of(model, directory)
    replayed, again, theirs = continued(engine, log)
    assert (replayed, again) == ("replayed", answer)
    for (layer, name), tensor in theirs.items():
        expected = state[f"bank.{layer}.{name}"]
        assert torch.equal(mine[layer, name], expected)
        torch.testing.assert_close(tensor, expected, **CLOSE)
    engine.close()
    assert stored(directory)[0]["turns"][:, 3].min() > 0, "written anew, every turn names its own preset"
    engine = engine_of(model, directory, bank=BANK.of("paper"))
    assert finish(run(engine, request("y", [9, *prompt(5)], session="s"))["y"]).session == "restored"
    engine.close()


def test_other_banks_refuse_it(model, directory):
    engine = engine_of(model, directory, bank=PAConfig(bank_size=6, segment=16, top_k=4))
    end = finish(run(engine, request("x", prompt(30), session="s"))["x"])
    assert end.session == "lost"
    assert "PA config" in end.note
    engine.close()


def test_a_log_of_today_names_every_preset(model, tmp_path):
    engine = engine_of(model, tmp_path)
    run(engine, request("x", prompt(30), session="s"))
    records, log = engine.records, engine.sessions.get(("tenant", "s")).log
    tensors = records.log_tensors(log, None)
    tensors["turns"][0, 3] = 0  # "on"
    with pytest.raises(SnapshotRefused, match="contradicts"):
        records.take_log(tensors, {"fingerprint": records.fingerprint})
    engine.close()
