"""The router's logic, without Ray: who holds a session, and what happens when replicas come and go."""

import random

import pytest

from deploy.ray.requests import session_key
from deploy.ray.table import SessionTable, digest, read_report, write_report
from pacellm.server.auth import Keys

KEYS = Keys({"key-of-anna": "anna", "key-of-bert": "bert"})


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def report(*sessions):
    return write_report(sessions)


def test_a_report_is_read_as_written():
    held = [(digest("anna", f"s{number}"), number) for number in range(100)]
    assert list(read_report(write_report(held))) == held
    assert len(write_report(held)) == 1200
    with pytest.raises(ValueError, match="whole number"):
        list(read_report(b"x" * 13))


def test_the_replica_that_reports_a_session_holds_it():
    table = SessionTable()
    table.update({"a": report((1, 3)), "b": report((2, 1))})
    assert [table.holder(key) for key in (1, 2, 3)] == ["a", "b", None]


def test_new_replicas_move_nothing():
    table = SessionTable()
    reports = {"a": report((1, 1)), "b": report((2, 1))}
    table.update(reports)
    table.update({**reports, "c": report()})
    assert [table.holder(1), table.holder(2)] == ["a", "b"]


def test_a_replica_that_goes_holds_nothing():
    table = SessionTable()
    table.update({"a": report((1, 1)), "b": report((2, 1))})
    table.sent(3, "a")
    table.update({"b": report((2, 1))})
    assert [table.holder(key) for key in (1, 2, 3)] == [None, "b", None]


def test_the_later_generation_wins_and_the_earlier_holder_is_asked_again_when_it_goes():
    table = SessionTable()
    table.update({"a": report((1, 5)), "b": report((1, 7))})
    assert table.holder(1) == "b"
    table.update({"a": report((1, 5)), "b": report()})
    assert table.holder(1) == "a"


def test_ties_stay_where_they_are():
    table = SessionTable()
    table.update({"a": report((1, 5))})
    table.update({"a": report((1, 5)), "b": report((1, 5))})
    assert table.holder(1) == "a"


def test_what_was_sent_counts_before_a_report_mentions_it():
    clock = Clock()
    table = SessionTable(clock)
    table.update({"a": report(), "b": report()})
    table.sent(1, "b")
    clock.now = 59
    table.update({"a": report(), "b": report((9, 1))})
    assert table.holder(1) == "b"
    table.update({"a": report(), "b": report((1, 1))})
    clock.now = 1000
    table.update({"a": report((1, 2)), "b": report((1, 1))})
    assert table.holder(1) == "a"


def test_what_no_report_mentions_is_forgotten():
    clock = Clock()
    table = SessionTable(clock)
    table.update({"a": report()})
    table.sent(1, "a")
    clock.now = 61
    table.update({"a": report((2, 1))})
    assert table.holder(1) is None


def test_the_table_is_what_the_last_reports_say():
    """Whatever happened before."""
    rng, table, reports = random.Random(0), SessionTable(), {}
    for _ in range(300):
        name = rng.choice("abcde")
        if rng.random() < 0.2:
            reports.pop(name, None)
        else:
            reports[name] = report(*((key, rng.randrange(4)) for key in rng.sample(range(20), rng.randrange(10))))
        table.update(dict(reports))
        for key in range(20):
            held = {name: dict(read_report(one))[key] for name, one in reports.items() if key in dict(read_report(one))}
            holder = table.holder(key)
            assert (holder is None) == (not held)
            assert holder is None or held[holder] == max(held.values())


def scope(path="/v1/chat/completions", **headers):
    return {
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }


def test_equal_names_of_two_tenants_are_two_sessions():
    one, other = (
        session_key(scope(X_Session_ID="s", authorization=f"Bearer key-of-{who}"), KEYS) for who in ("anna", "bert")
    )
    assert one == digest("anna", "s")
    assert other == digest("bert", "s")


@pytest.mark.parametrize("path", ["/v1/sessions/s", "/v1/sessions/s/fork", "/v1/sessions/s/snapshot"])
def test_a_session_is_named_in_the_path_too(path):
    assert session_key(scope(path, authorization="bearer key-of-anna"), KEYS) == digest("anna", "s")


@pytest.mark.parametrize(
    "one",
    [scope(), scope("/v1/sessions"), scope("/metrics"), scope(X_Session_ID="s"),
     scope(X_Session_ID="s", authorization="Bearer wrong-key")],
)  # fmt: skip
def test_who_names_no_session_or_has_no_key_is_anybodys(one):
    assert session_key(one, KEYS) is None


def test_without_keys_all_are_one_tenant():
    assert session_key(scope(x_session_id="s"), Keys({})) == digest("default", "s")
