"""What is written once for many tokens is, to the byte, what is written anew for each."""

import h11
import pytest

from pacellm.server import connection, sse

TEXTS = ("", " word", 'a "quoted" \\ one', "\n\t\x01", "Élan ☃ 😀 \u2028")


@pytest.mark.parametrize("text", TEXTS)
def test_text_events(text):
    def event(said):
        return sse.event({"id": "x", "choices": [{"index": 0, "delta": {"content": said}, "finish_reason": None}]})

    assert sse.TextEvent(event(sse.TextEvent.HOLE))(text) == event(text)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("headers", [[], [("content-length", "3")]])
def test_parts_of_a_body(version, headers):
    def sent(kind):
        conn = kind(h11.SERVER)
        conn.receive_data(b"GET / HTTP/" + version + b"\r\nHost: x\r\n\r\n")
        while conn.next_event() not in (h11.PAUSED, h11.NEED_DATA):
            pass
        head = conn.send(h11.Response(status_code=200, headers=headers))
        return (
            head
            + b"".join(conn.send(h11.Data(data=data)) for data in (b"a", b"", b"bc"))
            + conn.send(h11.EndOfMessage())
        )

    assert sent(connection._Exchange) == sent(h11.Connection)


def test_nothing_is_sent_behind_the_end():
    conn = connection._Exchange(h11.SERVER)
    with pytest.raises(h11.LocalProtocolError):
        conn.send(h11.Data(data=b"a"))
