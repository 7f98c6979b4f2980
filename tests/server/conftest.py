"""A live server on the bundled model, in a thread of this process, and a real client."""

import threading

import httpx
import openai
import pytest

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.engine.engine import Engine
from pacellm.model.load import load
from pacellm.server import connection, launcher
from pacellm.server.app import create_app
from pacellm.server.service import Service
from pacellm.server.settings import Settings
from pacellm.text.tokenizer import ChatTokenizer

NAME = "pacellm-demo"


class Live:
    """A running server, on a service that is not yet running."""

    def __init__(self, service, keys=None, shutdown_timeout=30):
        self.service, self.engine, settings = service, service.engine, service.settings
        self.limits = connection.ConnectionLimits(
            settings.max_connections, settings.head_seconds, settings.stall_seconds
        )
        config = launcher.config_of(create_app(self.service, keys), self.limits, host="127.0.0.1", port=0)
        self._server = launcher.Server(config, self.service, shutdown_timeout)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        waiting = threading.Event()
        while not self._server.started:
            assert self._thread.is_alive()
            waiting.wait(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        return self

    def __exit__(self, *_):
        self.http.close()
        self.client.close()
        self.end()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def end(self):
        """As SIGTERM does."""
        self._server.should_exit = True

    def sessions(self, tenant="default"):
        """A tenant's sessions, as ``GET /v1/sessions`` lists them where there are keys."""
        return self.service.thread.call(self.engine.ops.list(tenant)).result(10)

    def wait_until_idle(self, seconds=30):
        """Until no request is in the engine, and none is listened to."""
        waiting = threading.Event()
        for _ in range(int(seconds / 0.02)):
            if not (self.engine.has_work or self.service.thread.num_running or self.service._unfinished):
                return
            waiting.wait(0.02)
        raise AssertionError("requests are still in the engine")


def start(config=None, keys=None, files=None, traces=None, model=None, shutdown_timeout=30, **settings):
    """A server whose KV memory holds the whole context; pages that are not touched cost nothing.

    Args:
        files: attributes of the tokenizer, as another model's files would set them.
        traces: gets spans.
        model: another than the bundled one as it is.
        shutdown_timeout: seconds that running requests get at the end.
    """
    config, tokenizer = config or EngineConfig(kv_cache_memory=2**31), ChatTokenizer(MODEL_PATH)
    for name, value in (files or {}).items():
        setattr(tokenizer._tokenizer, name, value)
    engine = Engine(model or load(MODEL_PATH), config, tokenizer.backend)
    return Live(Service(engine, tokenizer, Settings(model_name=NAME, **settings), traces), keys, shutdown_timeout)


@pytest.fixture(scope="session")
def live():
    with start(keep_alive_seconds=0.05, max_body_bytes=2**20) as server:
        yield server


@pytest.fixture(scope="session")
def document():
    return make_document(num_tokens=1200, num_facts=6, seed=3, tokenizer=ChatTokenizer(MODEL_PATH)._tokenizer)


@pytest.fixture
def clean(live):
    live.http.delete("/v1/sessions")
    return live


@pytest.fixture
def read(clean, document):
    """The document, read and asked about once."""
    return clean.client.responses.create(
        model=NAME, input=f"{document.text}\n\n{document.facts[1].question}", temperature=0, max_output_tokens=24
    )


@pytest.fixture
def scripted(monkeypatch):
    """Lets the model of a server say a text, as far as it may."""
    from pacellm.engine import answer as module

    def say(server, text):
        server.service.grammars._load()
        tokens = server.service.grammars._tokens
        script = b" " + text.encode()  # this tokenizer's decoder takes the space off

        def choose(answers, sequence, logits, chosen):
            allowed = sequence.allowed(len(logits))
            left = script.removeprefix(b"".join(tokens[token] for token in sequence.generated))
            fitting = [2] if not left else [t for t, b in enumerate(tokens) if t > 5 and left.startswith(b)]
            may = [token for token in fitting if allowed is None or allowed[token]]
            assert may, f"stopped before {left!r}"
            return max(may, key=lambda token: len(tokens[token])), None

        monkeypatch.setattr(module.Answers, "_token", choose)

    return say
