"""Messages that stored responses keep, and which go first."""

from pacellm.server.response_store import ResponseStore, Transcript


def turn(text, parent=None):
    return Transcript(({"role": "user", "content": text},), parent, "a/root")


def test_shared_turns_are_kept_once_and_forgotten_last():
    dropped, forgotten = [], []
    kept = ResponseStore(10**6, 1000.0, dropped.append, forgotten.append)
    root = turn("x" * 1000)
    kept.put(("a", "one"), root, b"{}")
    alone = kept.num_bytes
    kept.put(("a", "two"), turn("y", root), b"{}")
    kept.put(("a", "three"), turn("z", root), b"{}")
    assert kept.num_bytes < 3 * alone
    assert [one["content"][0] for one in kept.get(("a", "three")).transcript.all()] == ["x", "z"]
    assert kept.drop(("a", "one"))
    assert not kept.drop(("a", "one"))
    assert len(kept.get(("a", "two")).transcript.all()) == 2
    assert forgotten == []
    kept.drop_all("a")
    assert (kept.num_bytes, len(kept), forgotten, dropped) == (0, 0, ["a/root"], [])


def test_calls_count_as_well():
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "x" * 5000}}
    said = Transcript(({"role": "assistant", "content": "", "tool_calls": [call]},), None, "a/root")
    assert said.num_bytes > 5000


def test_the_largest_tenants_oldest_go_first():
    dropped = []
    kept = ResponseStore(30_000, 1000.0, dropped.append, lambda scope: None)
    kept.put(("small", "one"), turn("x"), b"{}")
    for number in range(20):
        kept.put(("large", str(number)), turn("x" * 1000), b"{}")
        kept.get(("large", "0"))
    assert kept.num_bytes <= 30_000
    assert kept.get(("small", "one")) is not None
    assert kept.get(("large", "0")) is not None
    assert dropped[:2] == [("large", "1"), ("large", "2")]
    assert kept.was_dropped(("large", "1"))
    kept._ttl = -1.0
    assert kept.get(("large", "0")) is None
    kept._next_look = 0.0
    kept.put(("large", "new"), turn("x"))
    assert kept.num_bytes == 0
