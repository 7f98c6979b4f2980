"""The example of docs/sessions.md does what the page says."""

from tests.server.page import run_example


def test_the_example_runs_as_it_stands(clean):
    answers, follow_up = run_example(clean.url)
    assert answers == {"code": "48213", "museum": "Friday", "academy": "Tunis"}
    assert follow_up == "Tunis"
    assert sorted(item["id"] for item in clean.sessions()) == ["academy", "code", "museum", "report"]


def test_without_append_the_document_is_not_asked_about(clean):
    answers, _ = run_example(clean.url, append=False)
    assert not {"48213", "Friday", "Tunis"} & set(answers.values())
