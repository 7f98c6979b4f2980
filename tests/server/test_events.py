"""What is written once for many tokens, to the byte what is written anew for each; and what goes past its reader."""

import asyncio
import types

import h11
import pytest

from pacellm.errors import EngineError
from pacellm.server import connection, sse
from pacellm.server.event_queue import EventQueue
from pacellm.server.writing.answer import Answer
from pacellm.types import Admitted, Delta

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
        assert ours.takes_parts
        ours.write_part(data)
        theirs._write(theirs.conn.send(h11.Data(data=data)))
    ours.finish()
    theirs.finish()
    assert ours.sent == theirs.sent
    assert not ours.takes_parts


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
    assert not Wire(**how).takes_parts


class Reader:
    """A queue whose reader waits, and what is written past it."""

    def __init__(self, takes_parts=True):
        self.takes_parts, self.written = takes_parts, []
        self.queue = EventQueue()
        self.answer = Answer.__new__(Answer)
        self.answer._events, self.answer._wire = self.queue, types.SimpleNamespace(event=lambda chunk: chunk["text"])
        self.answer._parts = self._parts
        self.faults = []
        self.answer._service = types.SimpleNamespace(
            engine=types.SimpleNamespace(faults=types.SimpleNamespace(note=lambda *fault: self.faults.append(fault)))
        )
        self.answer.write_at_once(self)

    def write_part(self, data):
        self.written.append(data)

    def _parts(self, number, event):
        if event.text == "bad":
            raise ValueError("bad")
        return [{"text": event.text.encode()}] if event.text else []


def read(*pushed, takes_parts=True, waits=True):
    """(What was written at once, what the reader got, failures) of events."""

    async def main():
        reader = Reader(takes_parts)
        task = asyncio.ensure_future(reader.queue.get(0.2))
        if waits:
            await asyncio.sleep(0)
        for event in pushed:
            reader.queue.push(0, event)
        return reader.written, [event for _, event in await task], reader.faults

    return asyncio.run(main())


def test_text_is_written_while_the_reader_sleeps_on():
    assert read(Delta("a", (1,)), Delta("", (2,)), Delta("b", (3,))) == ([b"a", b"b"], [], [])


@pytest.mark.parametrize("how", [{"takes_parts": False}, {"waits": False}], ids=["client", "reader"])
def test_text_waits_where_it_cannot_be_written_or_something_is_before_it(how):
    events = [Delta("a", (1,)), Delta("b", (2,))]
    assert read(*events, **how) == ([], events, [])


def test_nothing_passes_what_waits():
    admitted, behind = Admitted("none", 0), Delta("b", (2,))
    assert read(Delta("a", (1,)), admitted, behind) == ([b"a"], [admitted, behind], [])


def test_text_that_cannot_be_made_ends_the_stream():
    written, (failed, behind), faults = read(Delta("a", (1,)), Delta("bad", (2,)), Delta("b", (3,)))
    assert written == [b"a"]
    assert isinstance(failed.error, EngineError)
    assert len(faults) == 1
    assert behind == Delta("b", (3,))  # which nobody reads behind a failure
