"""Servers, and browsers that look at them."""

import pytest

from pacellm.config import EngineConfig, PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.text.tokenizer import ChatTokenizer
from tests.page.chromium import Chromium
from tests.server.conftest import scripted, start  # noqa: F401


@pytest.fixture(scope="session")
def server():
    config = EngineConfig(
        working_memory=2560, working_memory_window=512, working_memory_index=("lexical",), max_model_len=50_000,
        bank=PAConfig(segment=256),
    )  # fmt: skip
    with start(config) as live:
        yield live


@pytest.fixture(scope="session")
def document():
    return make_document(6000, 12, 5, ChatTokenizer(MODEL_PATH))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def page(browser, server):
    """The server's page, with nothing on the server."""
    browser.open("about:blank")  # no earlier page asks any more
    server.http.delete("/v1/sessions")
    browser.size(1440, 900)
    browser.problems.clear()
    browser.requested.clear()
    browser.open(server.url)
    browser.wait("document.querySelector('#session-name').innerText")
    yield browser
    assert browser.problems == []
    assert all(url.startswith((server.url, "data:")) for url in browser.requested), browser.requested
