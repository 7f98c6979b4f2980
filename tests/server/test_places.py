"""Where passages stand in what was sent."""

import pytest

from pacellm.server.writing.places import NOTHING, Sent, place_of

TEXTS = ("You help.", "one two three. one two three. four", "", "five one two three")


@pytest.mark.parametrize(
    ("passage", "position", "place"),
    [
        ("help", 0.9, (0, 4, 8)),
        ("one two", 0.0, (1, 0, 7)),
        ("one two", 0.4, (1, 15, 22)),
        ("one two", 1.0, (3, 5, 12)),
        ("\ufffd four", 0.1, (1, 29, 34)),
        ("five one two three", 0.0, (3, 0, 18)),
        ("three. five", 0.5, None),
        ("\ufffd", 0.5, None),
        ("", 0.5, None),
        ("seven", 0.5, None),
    ],
)
def test_the_nearest_place_of_the_same_words(passage, position, place):
    found = place_of(passage, position, Sent("message", TEXTS))
    assert (None if found is None else (found["message"], found["start"], found["end"])) == place
    if found is not None:
        assert TEXTS[found["message"]][found["start"] : found["end"]] == passage.strip("\ufffd")


def test_without_messages_there_is_none():
    assert place_of("one", 0.0, NOTHING) is None


def test_a_text_of_the_same_words_over_and_over_is_looked_at_once():
    text = "ab" * 4_000_000
    assert place_of("ab" * 100, 0.5, Sent("prompt", (text,), 2)) == {"prompt": 2, "start": 4_000_000, "end": 4_000_200}
