"""What is written once for many tokens is, to the byte, what is written anew for each."""

import types

import h11
import pytest

from pacellm.server import connection, sse

TEXTS = ("", " word", 'a "quoted" \\ one', "\n\t\x01", "Élan ☃ 😀 \u2028")


@pytest.mark.parametrize("text", TEXTS)
def test_text_events(text):
    def event(said):
        return sse.event({"id": "x", "choices": [{"index": 0, "delta": {"content": said}, "finish_reason": None}]})

    assert sse.TextEvent(event(sse.TextEvent.HOLE))(text) == event(text)


class Wire(connection.Connection):
    """A connection without a loop, whose head was sent.

    Attributes:
        sent: what went to its client.
    """

    def __init__(self, version=b"1.1", headers=(), is_paused=False, is_closing=False):
        self.conn, self.sent = h11.Connection(h11.SERVER), b""
        self.flow = types.SimpleNamespace(write_paused=is_paused)
        self.transport = types.SimpleNamespace(write=self._write, is_closing=lambda: is_closing)
        self.conn.receive_data(b"GET / HTTP/" + version + b"\r\nHost: x\r\n\r\n")
        while self.conn.next_event() not in (h11.PAUSED, h11.NEED_DATA):
            pass
        self._write(self.conn.send(h11.Response(status_code=200, headers=list(headers))))

    def _write(self, data):
        self.sent += data

    def finish(self):
        self._write(self.conn.send(h11.EndOfMessage()))


def test_parts_of_a_body_are_h11s_chunks():
    ours, theirs = Wire(), Wire()
    for data in (b"a", b"bc", b"d" * 300):
        assert ours.write_part(data)
        theirs._write(theirs.conn.send(h11.Data(data=data)))
    ours.finish()
    theirs.finish()
    assert ours.sent == theirs.sent
    assert not ours.write_part(b"behind the end")


@pytest.mark.parametrize(
    "how",
    [
        {"version": b"1.0"},
        {"headers": [("content-length", "3")]},
        {"is_paused": True},
        {"is_closing": True},
    ],
)
def test_what_is_no_chunk_or_must_wait_is_left_to_send(how):
    wire = Wire(**how)
    before = wire.sent
    assert not wire.write_part(b"abc")
    assert wire.sent == before
    assert not Wire().write_part(b"")
