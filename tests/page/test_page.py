"""The page in a browser, by clicks and keys."""

import json
import threading

import httpx
import pytest

from pacellm.config import EngineConfig
from pacellm.server.auth import Keys
from tests.server.conftest import start
from tests.server.talk import WEATHER

pytestmark = pytest.mark.page
ANSWERED = "document.querySelectorAll('.report').length === {}"


def ask(page, text, answers=1):
    page.type("#question", text)
    page.press("Enter", 13)
    page.wait(ANSWERED.format(answers))


@pytest.fixture
def told(page, document, tmp_path):
    """The page, after a document was dropped and asked about."""
    file = tmp_path / "archive.txt"
    file.write_text(document.text)
    page.drop("#composer", file)
    page.wait("!document.querySelector('#file-chip').hidden")
    ask(page, document.facts[4].question)
    return page


def test_a_dropped_document_is_read_and_what_was_called_back_is_marked(told, document):
    fact = document.facts[4]
    assert fact.answer in told.text(".message.assistant .said")
    assert "archive.txt" in told.text(".document summary")
    told.wait("document.querySelectorAll('.document mark').length > 3")
    best = told.text("mark.best")
    assert fact.answer in best
    assert best.startswith("#1")
    assert told.run("document.querySelectorAll('.passage').length") == 8
    told.click(".passage")
    assert told.run("document.querySelector('mark.shown').classList.contains('best')")
    ask(told, document.facts[7].question, 2)  # appended: where passages stand is found by their words
    told.wait(f"document.querySelector('mark.best').innerText.includes('{document.facts[7].answer}')")
    told.click(".passage")  # the first answer's again
    assert fact.answer in told.text("mark.shown")


def test_how_far_a_prompt_is_read_is_shown_and_cancelling_leaves_nothing(page, server, document, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(document.text * 7)
    page.drop("#composer", file)
    page.wait("!document.querySelector('#file-chip').hidden")
    page.type("#question", "What is it?")
    page.click("#send")
    page.wait("/read [\\d,]+ of 4\\d,\\d+ tokens, .* left/.test(document.querySelector('#reading-text').innerText)")
    assert page.run("document.querySelector('#reading-done').getBoundingClientRect().width") > 0
    page.wait("document.querySelector('#requests tbody')?.innerText.includes('reading')")
    page.click("#cancel")
    page.wait("document.querySelector('.failed')")
    assert "cancelled" in page.text(".failed")
    assert page.run("document.querySelector('#question').value") == "What is it?"
    assert "long.txt" in page.text("#file-chip")
    assert page.run("document.querySelector('#reading').hidden")
    server.wait_until_idle()
    assert server.sessions() == []


def test_banks_by_slot(told, server):
    told.wait("document.querySelector('#cosines')")
    bank = server.http.get("/v1/sessions/chat-1/banks/1").json()
    assert f"{bank['filled']} of 100" in told.text("#banks")
    told.click("#cosines", 0.005)
    told.wait("document.querySelector('.slot .wrote')")
    (writer,) = (one for one in bank["writers"] if one["stamp"] == bank["stamp"][0])
    assert told.text(".slot").startswith(f"slot 0: {bank['usage'][0]} use")
    assert writer["text"][:80].strip() in told.run("document.querySelector('.wrote').textContent")
    told.click("#by-likeness")
    told.click("#layers button:nth-child(2)")
    told.wait("document.querySelector('#layers button:nth-child(2)').getAttribute('aria-selected') === 'true'")
    told.wait("document.querySelector('.report').innerText.includes('layer 4')")
    assert told.run("document.querySelectorAll('#ranks canvas').length") == 1
    assert told.run("document.querySelector('#ranks .u-legend').innerText").count("layer") == 2


def test_tokens_are_coloured_by_what_they_found(told, server):
    trace = told.run("[...document.querySelectorAll('.token')].map((one) => one.className)")
    assert {one.split()[-1] for one in trace[:-1]} <= set("hfme")
    assert trace[-1] == "token quiet"  # not fed
    told.click(".report button")
    assert told.run("document.querySelectorAll('.token').length") == 0


def test_sessions_are_a_tree_and_go_when_told_twice(told, server):
    told.click("[data-session='chat-1'] button:nth-of-type(1)")
    told.wait("document.querySelector(\"[data-session='chat-1.2'].depth-1.chosen\")")
    assert told.run("document.querySelectorAll('.document').length") == 1  # what was said is there too
    ask(told, "And then?", 2)
    told.wait("document.querySelector('#session-facts').innerText.includes('2 turns, a fork of chat-1')")
    told.click("[data-session='chat-1']")
    told.wait("document.querySelectorAll('.report').length === 1")
    told.click("[data-session='chat-1'] button:nth-of-type(2)")
    told.wait("document.querySelector(\"[data-session='chat-1']\").innerText.includes('really')")
    assert len(server.sessions()) == 2
    told.click("[data-session='chat-1'] button:nth-of-type(2)")
    told.wait("document.querySelector(\"[data-session='chat-1.2'].depth-0\")")
    assert [one["id"] for one in server.sessions()] == ["chat-1.2"]


def test_text_is_never_markup(page):
    evil = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
    ask(page, evil)
    assert page.text(".message.user .said") == evil
    assert page.run("document.querySelectorAll('.message img, .message b').length") == 0
    assert "taken" not in page.run("document.title")


def test_calls_and_json_are_shown_as_such(page, server, scripted):
    scripted(server, '<tool_call>{"name": "get_weather", "arguments": {"place": "Oslo", "unit": "C"}}</tool_call>')
    page.click("#options summary")
    page.type("#tools", json.dumps([WEATHER]))
    page.click("#options summary")
    ask(page, "How is the weather?")
    page.wait("document.querySelector('.call')")
    assert "get_weather" in page.text(".call")
    assert '"place": "Oslo"' in page.text(".call .json")
    scripted(server, "<answer>It has 4 degrees.</answer>")
    page.type(".call input", "4 degrees")
    page.press("Enter", 13)
    page.wait(ANSWERED.format(2))
    assert page.text(".message.tool .said") == "4 degrees"
    assert page.text(".message:last-child .said").startswith("It has 4 degrees.")


def test_an_answer_in_a_form_is_shown_as_json(page):
    schema = {"type": "object", "properties": {"code": {"enum": [48213, 17]}}, "required": ["code"],
              "additionalProperties": False}  # fmt: skip
    page.click("#options summary")
    page.type("#schema", json.dumps(schema))
    page.click("#options summary")
    ask(page, "Which code?")
    assert json.loads(page.text(".json"))["code"] in (48213, 17)
    assert page.run("document.querySelector('.json .k').innerText") == '"code":'


def test_others_requests_are_listed_and_can_be_ended(page, server):
    def run():
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20_000, "ignore_eos": True}
        ended.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code)

    ended = []
    thread = threading.Thread(target=run)
    thread.start()
    page.wait("document.querySelector('#requests tbody')?.innerText.includes('generating')")
    page.click("#requests button")
    thread.join(30)
    assert ended == [499]
    page.wait("document.querySelector('#requests').innerText.includes('No request')")


def test_a_key_is_asked_for_and_stays_in_the_tab(browser):
    with start(EngineConfig(kv_cache_memory=2**28), Keys({"key-of-a": "a", "key-of-b": "b"})) as server:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "session_id": "of-b"}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer key-of-b"})
        browser.open(server.url)
        browser.wait("!document.querySelector('#key-form').hidden")
        assert "key" in browser.text("#problem")
        browser.type("#key", "wrong-key")
        browser.press("Enter", 13)
        browser.wait("document.querySelector('#key').value === ''")
        browser.type("#key", "key-of-a")
        browser.press("Enter", 13)
        browser.wait("document.querySelector('#session-name').innerText")
        browser.wait("document.querySelector('#problem').innerText === ''")
        ask(browser, "hello")
        browser.wait("document.querySelector(\"[data-session='chat-1']\")")
        assert "of-b" not in browser.text("#sessions")
        assert browser.run("Object.values(sessionStorage)") == ["key-of-a"]
        assert browser.run("localStorage.length + document.cookie.length") == 0
    browser.open("about:blank")


def test_another_machine_without_a_key_sees_what_it_has_said(page, server):
    page.open("about:blank")
    page.send("Network.setExtraHTTPHeaders", headers={"X-Forwarded-For": "192.0.2.7"})
    page.open(server.url)
    page.wait("document.querySelector('#session-name').innerText")
    ask(page, "hello")
    page.wait("document.querySelector(\"[data-session='chat-1']\")")
    page.wait("document.querySelector('#cosines')")
    assert "own machine" in page.text("#load")
    page.send("Network.setExtraHTTPHeaders", headers={})
    refused = [one for one in page.problems if "400" in one]
    assert len(refused) == len(page.problems) == 2  # asked once each: sessions, requests
    page.problems.clear()


def test_the_api_can_be_read_and_tried(browser, server):
    browser.problems.clear()
    browser.requested.clear()
    browser.open(f"{server.url}/docs")
    browser.wait("document.querySelectorAll('.opblock').length > 20")
    tags = browser.run("[...document.querySelectorAll('.opblock-tag')].map((one) => one.dataset.tag)")
    assert tags == ["Answers", "Sessions", "Requests", "Tokens", "Server"]
    browser.click("#operations-Server-version_version_get .opblock-summary-control")
    browser.click("#operations-Server-version_version_get .try-out button")
    browser.click("#operations-Server-version_version_get .execute")
    browser.wait(
        "document.querySelector('.live-responses-table tbody .response-col_status')?.innerText.startsWith('200')"
    )
    assert all(url.startswith((server.url, "data:")) for url in browser.requested), browser.requested
    assert browser.problems == []
