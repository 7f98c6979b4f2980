"""What a session directory that cannot be written costs, and what damage in it does."""

import contextlib
import errno
import json
import os
import random
import shutil

import pytest

from pacellm.engine.engine import run_until_idle
from pacellm.model.load import prepare
from pacellm.sessions import atomic, folder, history_files
from pacellm.sessions.disk import LOG, STATE
from pacellm.sessions.folder import OWNER, name_of
from pacellm.sessions.owner import OwnerRefused, read_owner
from pacellm.types import Failed
from tests.engine.helpers import assert_nothing_held, crash, finish, new_engine, operate, request, run, tokens
from tests.models import tiny
from tests.sessions.broken_disk import FIRST, KEY, KINDS, MORE, break_disk, second_turn

OTHER = ("tenant", "t")


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("llama"))


@pytest.fixture(scope="module")
def wanted(model):
    """(the second prompt, its answer)."""
    return second_turn(model)[:2]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def new(model, path, **changes):
    return new_engine(model, session_dir=str(path), **changes)


def ask(engine, ids, session="s"):
    """(the end, the answer)."""
    events = run(engine, request("x", ids, session=session))["x"]
    return finish(events), tokens(events)


@pytest.fixture(scope="module")
def template(model, tmp_path_factory):
    """A directory with two sessions at rest."""
    path = tmp_path_factory.mktemp("sessions")
    engine = new(model, path)
    for name in "st":
        ask(engine, FIRST, name)
    engine.close()
    return path


@pytest.fixture
def stored(template, tmp_path):
    return shutil.copytree(template, tmp_path / "stored")


def folder_of(path, key=KEY):
    return path / name_of(key, (path / "key").read_bytes())


# -- nothing can be written ------------------------------------------------------------------------------------


def test_requests_go_on_in_memory(model, wanted, tmp_path, monkeypatch, kind):
    engine = new(model, tmp_path)
    with monkeypatch.context() as patch:
        break_disk(patch, kind)
        assert ask(engine, FIRST)[0].session == "new"
        end, answer = ask(engine, wanted[0])
        assert (end.session, end.note, answer) == ("resident", None, wanted[1])
        assert engine.mover.stats.failures == 2
    assert_nothing_held(engine)
    engine.close()
    assert ask(new(model, tmp_path), wanted[0] + MORE)[0].session == "restored"


def test_what_is_there_is_read_and_gone_on_from(model, wanted, stored, monkeypatch, kind):
    with monkeypatch.context() as patch:
        engine = new(model, stored)
        break_disk(patch, kind)
        end, answer = ask(engine, wanted[0])
        assert (end.session, answer) == ("restored", wanted[1])
        assert ask(engine, wanted[0] + MORE)[0].session == "resident"
    ask(engine, wanted[0] + MORE)
    crash(engine)
    end, _ = ask(new(model, stored), wanted[0] + MORE)
    assert end.session == "replayed"
    assert "3 later commit(s)" in end.note


def test_synced_commits_fail_and_name_no_path(model, wanted, tmp_path, monkeypatch, kind):
    engine = new(model, tmp_path, session_sync=True)
    ask(engine, FIRST)
    with monkeypatch.context() as patch:
        break_disk(patch, kind)
        failed = run(engine, request("x", wanted[0], session="s"))["x"][-1]
    assert isinstance(failed, Failed)
    assert os.strerror(KINDS[kind]) in str(failed.error)
    assert str(tmp_path) not in str(failed.error)
    end, answer = ask(engine, wanted[0])
    assert (end.session, answer) == ("resident", wanted[1])
    assert_nothing_held(engine)


def test_a_deletion_that_is_not_durable_says_so_and_is_tried_again(model, stored, monkeypatch, kind):
    engine = new(model, stored)
    with monkeypatch.context() as patch:
        break_disk(patch, kind)
        assert operate(engine, engine.ops.delete(KEY)) == {
            "id": "s", "object": "session.deleted", "deleted": True, "durable": False
        }  # fmt: skip
        assert ask(engine, MORE)[0].session == "new"
        assert ask(engine, MORE)[0].session == "resident"
    engine.mover.files.deletions._next_try = 0
    engine.step()
    engine.worker.finish()
    assert not engine.mover.disk.doomed
    assert not (folder_of(stored) / LOG).exists(), "what was deleted is gone"
    end, answer = ask(engine, MORE)
    assert end.session == "resident"
    engine.close()
    again = new(model, stored)
    assert ask(again, MORE)[1] == answer
    shown = operate(again, again.ops.show(KEY))
    assert (shown["commits"], shown["tokens"]) == (4, len(MORE) + 9)


@pytest.mark.parametrize("how", ["request", "shutdown"])
def test_what_was_deleted_goes_before_anything_takes_its_place(model, stored, monkeypatch, how):
    engine = new(model, stored)
    with monkeypatch.context() as patch:
        break_disk(patch, "read-only")
        operate(engine, engine.ops.delete(KEY))
    if how == "request":
        ask(engine, MORE)
        crash(engine)
        end, _ = ask(new(model, stored), FIRST)
        assert (end.session, end.usage.cached_tokens) == ("lost", 0)
    else:
        engine.close()
        assert ask(new(model, stored), FIRST)[0].session == "new"


def test_a_full_disk_makes_room_for_the_tombstone(model, stored, monkeypatch):
    engine, publish = new(model, stored), folder.publish

    def full(path, *drafts):
        if (path / LOG).exists():
            raise OSError(28, "No space left on device", str(path))
        publish(path, *drafts)

    monkeypatch.setattr(folder, "publish", full)
    assert "durable" not in operate(engine, engine.ops.delete(KEY))
    engine.close()
    assert ask(new(model, stored), FIRST)[0].session == "new"


def test_on_a_full_disk_a_state_gives_way_so_that_its_session_can_be_taken_over(model, wanted, stored, monkeypatch):
    engine, publish = new(model, stored, session_sync=True), folder.publish

    def full(path, *drafts):
        if (path / STATE).exists():
            raise OSError(28, "No space left on device", str(path))
        publish(path, *drafts)

    monkeypatch.setattr(folder, "publish", full)
    end, answer = ask(engine, wanted[0])
    assert (end.session, answer) == ("replayed", wanted[1])


def full_of_states(monkeypatch, directory):
    """The disk is full for as long as there is a state."""
    publish = atomic.publish

    def full(path, *drafts):
        if any(directory.glob(f"*/{STATE}")):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        publish(path, *drafts)

    for module in (folder, history_files):
        monkeypatch.setattr(module, "publish", full)


@pytest.mark.parametrize("sync", [False, True])
def test_on_a_full_disk_others_states_give_way_to_what_must_be_there(model, wanted, stored, monkeypatch, sync):
    engine = new(model, stored, session_sync=sync)
    with monkeypatch.context() as patch:
        full_of_states(patch, stored)
        end, answer = ask(engine, wanted[0])
        assert (end.session, answer) == ("replayed" if sync else "restored", wanted[1])
        assert "durable" not in operate(engine, engine.ops.fork(OTHER, ("tenant", "u"), None))
        assert "durable" not in operate(engine, engine.ops.reset(("tenant", "u")))
        assert "durable" not in operate(engine, engine.ops.delete(("tenant", "u")))
        if sync:
            crash(engine)
        else:
            engine.close()
    assert ask(new(model, stored), FIRST, "t")[0].session in ("replayed", "restored")


def test_at_the_end_logs_are_written_where_states_had_filled_the_disk(model, stored, monkeypatch):
    engine = new(model, stored)
    for name in "abc":
        ask(engine, FIRST, name)
    with monkeypatch.context() as patch:
        full_of_states(patch, stored)
        engine.close()
    again = new(model, stored)
    assert [ask(again, FIRST, name)[0].session for name in "abcst"] == ["replayed"] * 5


def test_a_disk_that_stays_full_costs_every_state_and_no_session(model, wanted, stored, monkeypatch):
    engine = new(model, stored, session_sync=True)
    with monkeypatch.context() as patch:
        break_disk(patch, "full")
        end = run(engine, request("x", wanted[0], session="s"))["x"][-1]
    assert isinstance(end, Failed)
    assert "opened in the session directory: No space left on device" in str(end.error)
    assert not list(stored.glob(f"*/{STATE}"))
    assert ask(engine, wanted[0])[1] == wanted[1]
    assert ask(engine, FIRST, "t")[0].session == "replayed"


def test_changes_that_are_not_durable_say_so(model, tmp_path, monkeypatch, kind):
    engine = new(model, tmp_path)
    ask(engine, FIRST)
    data = operate(engine, engine.snapshots.export(KEY, kv=True, limit=2**30))
    checked = engine.snapshots.check(bytearray(data), trust_unsigned=False)
    with monkeypatch.context() as patch:
        break_disk(patch, kind)
        forked = operate(engine, engine.ops.fork(KEY, OTHER, None))
        reset = operate(engine, engine.ops.reset(KEY))
        put = operate(engine, engine.snapshots.put(("tenant", "u"), checked, None))
        assert [one["durable"] for one in (forked, reset, put)] == [False] * 3
        assert ask(engine, FIRST, "t")[0].session == "resident"
    engine.close()
    again = new(model, tmp_path)
    found = [ask(again, FIRST, name)[0].session for name in "stu"]
    assert found == ["new", "restored", "restored"]


def test_erasing_all(model, stored, monkeypatch):
    engine = new(model, stored)
    with monkeypatch.context() as patch:
        break_disk(patch, "read-only")
        assert operate(engine, engine.ops.delete_all("tenant")) == (2, 2)
    assert operate(engine, engine.ops.delete_all("tenant")) == (2, 0)
    engine.close()
    assert [len(list(folder_of(stored, key).iterdir())) for key in (KEY, OTHER)] == [2, 2]


def test_a_log_that_cannot_be_read_fails_the_request_and_loses_nothing(model, wanted, stored, monkeypatch):
    engine = new(model, stored)
    with monkeypatch.context() as patch:

        def refuse(*_):
            raise OSError(24, "Too many open files", str(stored))

        patch.setattr(engine.mover.disk, "open", refuse)
        failed = run(engine, request("x", wanted[0], session="s"))["x"][-1]
        assert "Too many open files" in str(failed.error)
        assert str(stored) not in str(failed.error)
        shown = engine.call(engine.ops.show(KEY))
        run_until_idle(engine)
        assert "Too many open files" in str(shown.exception(1))
    assert ask(engine, wanted[0])[1] == wanted[1]


# -- damage ----------------------------------------------------------------------------------------------------


def changed(data, **fields):
    found = json.loads(data)
    return json.dumps({**found["owner"], **fields}).encode()


def damages(data):
    """``owner.json`` as it should never be."""
    about = json.loads(data)["owner"]["about"]
    yield from (b"", b"{", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, data[: len(data) // 2], data * 9000)
    for fields in (
        {"server": "a\0b"}, {"server": "../../key"}, {"epoch": None}, {"generation": "3"}, {"generation": -1},
        {"generation": 10**40}, {"changed": float("nan")}, {"deleted": 0}, {"tenant": 7}, {"id": "another"}, {"new": 1},
        {"about": None}, {"about": {**about, "last_used": None, "tokens": None}}, {"about": {**about, "banks": [1]}},
        {"about": {**about, "banks": {"x": {}}}}, {"about": {**about, "ttl": "1"}},
    ):  # fmt: skip
        yield changed(data, **fields)
    rng = random.Random(0)
    for _ in range(40):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(damaged)


def test_every_damage_is_seen(template):
    good, secret = (folder_of(template) / OWNER).read_bytes(), (template / "key").read_bytes()
    assert read_owner(good, secret).seen[1:] == (1, 1)
    taken = []
    for damaged in damages(good):
        with contextlib.suppress(OwnerRefused):
            taken.append(read_owner(damaged, secret).id)
    assert taken == ["another"], "which its folder's name tells"


@pytest.mark.parametrize("numbers", [(0, 9, 21), pytest.param(range(65), marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_damaged_owner_is_set_aside_and_the_log_tells(model, wanted, template, stored, numbers):
    good = (folder_of(template) / OWNER).read_bytes()
    for damaged in [list(damages(good))[number] for number in numbers]:
        shutil.rmtree(stored)
        shutil.copytree(template, stored)
        (folder_of(stored) / OWNER).write_bytes(damaged)
        engine = new(model, stored)
        assert [session.key for session in engine.sessions if session.key == OTHER], "the others are there"
        end, answer = ask(engine, wanted[0])
        assert (end.session, answer) == ("restored", wanted[1]), damaged[:200]
        assert "owner.json was refused" in end.note
        assert str(stored) not in end.note
        assert (folder_of(stored) / "owner.refused").read_bytes() == damaged
        assert_nothing_held(engine)
        crash(engine)


def test_a_missing_owner(model, wanted, stored):
    (folder_of(stored) / OWNER).unlink()
    engine = new(model, stored)
    end, answer = ask(engine, wanted[0])
    assert (end.session, answer) == ("restored", wanted[1])
    assert "owner.json is missing" in end.note


def test_an_owner_from_before_there_was_a_digest(model, wanted, stored):
    path = folder_of(stored) / OWNER
    path.write_bytes(changed(path.read_bytes()))
    end, answer = ask(new(model, stored), wanted[0])
    assert (end.session, end.note, answer) == ("restored", None, wanted[1])


@pytest.mark.parametrize("log", ["gone", "damaged"])
def test_nothing_tells_whose_it_was(model, stored, log):
    path = folder_of(stored)
    (path / OWNER).write_bytes(b"")
    if log == "gone":
        (path / LOG).unlink()
        (path / STATE).unlink()
    else:
        (path / LOG).write_bytes(b"not a log")
    engine = new(model, stored)
    end, _ = ask(engine, FIRST)
    assert end.session == "lost"
    assert "owner.json was refused" in end.note
    assert (path / "owner.refused").read_bytes() == b""
    if log == "damaged":
        engine.close()
        assert (path / "log.refused").read_bytes() == b"not a log"
        engine = new(model, stored)
    assert ask(engine, FIRST)[0].session in ("resident", "restored")


def test_damage_while_the_session_is_in_memory(model, wanted, stored):
    engine = new(model, stored)
    ask(engine, FIRST)
    (folder_of(stored) / OWNER).write_bytes(b"{}")
    end, answer = ask(engine, FIRST)
    assert end.session == "resident"
    engine.close()
    assert (folder_of(stored) / "owner.refused").read_bytes() == b"{}"
    assert ask(new(model, stored), FIRST)[1] == answer


def test_refused_files_never_take_each_others_place(model, wanted, stored):
    path = folder_of(stored)
    for number, names in ((1, ["owner.refused"]), (2, ["owner.1.refused", "owner.refused"])):
        (path / OWNER).write_bytes(b"%d" % number)
        engine = new(model, stored)
        ask(engine, FIRST)
        engine.close()
        assert sorted(one.name for one in path.glob("owner*.refused")) == names
    engine = new(model, stored)
    assert operate(engine, engine.ops.delete(KEY))["deleted"]
    assert sorted(one.name for one in path.iterdir()) == ["lock", OWNER]


def test_a_damaged_owner_is_erased_with_the_others(model, stored):
    (folder_of(stored) / OWNER).write_bytes(b"{}")
    engine = new(model, stored)
    assert operate(engine, engine.ops.delete_all("tenant")) == (2, 0)
    assert sorted(one.name for one in folder_of(stored).iterdir()) == ["lock", OWNER]
