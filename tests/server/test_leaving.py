"""Clients that go at any moment of any request, beside one that stays: it is answered as if it were alone."""

import asyncio
import functools
import itertools
import random

import pytest

from pacellm.config import EngineConfig
from tests.server.conftest import NAME, start
from tests.server.guests import Visit, counting

TEXT = "The access code of the amber archive is 48213. "
_names = itertools.count()
GENERATION = {"model": NAME, "temperature": 0, "ignore_eos": True}


def chat(**more):
    return "POST", "/v1/chat/completions", {**GENERATION, "messages": [{"role": "user", "content": TEXT}],
                                            "max_tokens": 2, **more}  # fmt: skip


def completion(**more):
    return "POST", "/v1/completions", {**GENERATION, "prompt": TEXT, "max_tokens": 2, **more}


def response(**more):
    return "POST", "/v1/responses", {"model": NAME, "temperature": 0, "input": TEXT, "max_output_tokens": 1, **more}


def fresh():
    return f"made-{next(_names)}"


# each is called anew for every visit, so that what it names is not there yet
STREAMED = {
    "chat": lambda: chat(stream=True),
    "chat, session": lambda: chat(stream=True, session_id="s"),
    "chat, new session": lambda: chat(stream=True, session_id=fresh()),
    "chat, three choices": lambda: chat(stream=True, n=3, return_progress=True),
    "chat, idempotent": lambda: (*chat(stream=True), [(b"idempotency-key", fresh().encode())]),
    "chat, grammar": lambda: chat(stream=True, structured_outputs={"choice": ["yes", "no"]}),
    "completion": lambda: completion(stream=True, prompt=[TEXT, TEXT * 2], echo=True, logprobs=1),
    "response": lambda: response(stream=True),
    "response, new conversation": lambda: response(stream=True, conversation=fresh()),
    "response, conversation": lambda: response(stream=True, conversation="c"),
    "response, behind another": lambda: response(stream=True, previous_response_id="$stored"),
}


def in_one_piece(make):
    method, path, body, *rest = make()
    return method, path, {**body, "stream": False}, *rest


OTHERS = {
    "create": lambda: ("POST", "/v1/sessions", {"session_id": fresh()}),
    "list": lambda: ("GET", "/v1/sessions"),
    "show": lambda: ("GET", "/v1/sessions/s"),
    "fork": lambda: ("POST", "/v1/sessions/s/fork", {"session_id": fresh()}),
    "reset": lambda: ("POST", "/v1/sessions/$new/reset"),
    "delete": lambda: ("DELETE", "/v1/sessions/$new"),
    "get snapshot": lambda: ("GET", "/v1/sessions/s/snapshot?kv=true"),
    "put snapshot": lambda: ("PUT", f"/v1/sessions/{fresh()}/snapshot", "$snapshot"),
    "show response": lambda: ("GET", "/v1/responses/$stored"),
    "delete response": lambda: ("DELETE", "/v1/responses/$stored"),
    "tokenize": lambda: ("POST", "/tokenize", {"prompt": TEXT}),
    "detokenize": lambda: ("POST", "/detokenize", {"tokens": [5, 6, 7]}),
    "cancel": lambda: ("POST", "/v1/requests/nobody/cancel"),
    "models": lambda: ("GET", "/v1/models"),
    "model": lambda: ("GET", f"/v1/models/{NAME}"),
    "openapi": lambda: ("GET", "/openapi.json"),
    "health": lambda: ("GET", "/health"),
    "ready": lambda: ("GET", "/ready"),
    "version": lambda: ("GET", "/version"),
    "metrics": lambda: ("GET", "/metrics"),
    "delete all": lambda: ("DELETE", "/v1/sessions"),
}
CASES = {
    **{f"{name}, streamed": make for name, make in STREAMED.items()},
    **{f"{name}, whole": functools.partial(in_one_piece, make) for name, make in STREAMED.items()},
    **OTHERS,
}


class Hotel:
    """A service whose app is called without a server between.

    Args:
        live: a server that is not started.
    """

    def __init__(self, live):
        self.service, self.app = live.service, live._server.config.app
        self._snapshot = b""

    async def ask(self, method, path, body=None, headers=(), **how):
        return await Visit(self.app, method, path, body, headers, **how).run()

    async def furnish(self):
        """What the visits refer to."""
        for asked in (chat(session_id="s"), response(conversation="c")):
            assert (await self.ask(*asked)).status == 200
        self._snapshot = (await self.ask("GET", "/v1/sessions/s/snapshot?kv=true")).content

    async def visit(self, make, **how):
        method, path, *more = make()
        body, rest = (more[0] if more else None), more[1:]
        if "$new" in path:
            name = fresh()
            await self.ask("POST", "/v1/sessions", {"session_id": name})
            path = path.replace("$new", name)
        if "$stored" in path or (isinstance(body, dict) and body.get("previous_response_id") == "$stored"):
            name = (await self.ask(*response())).json()["id"]
            path = path.replace("$stored", name)
            body = {**body, "previous_response_id": name} if isinstance(body, dict) else body
        return await self.ask(method, path, self._snapshot if body == "$snapshot" else body, *rest, **how)

    async def steady(self, until):
        """A long answer, asked for again and again; what it said."""
        said = []
        while not said or not until.is_set():
            answer = await self.ask(*chat(max_tokens=40))
            assert answer.status == 200, answer.content
            said.append(answer.json()["choices"][0]["message"]["content"])
        return said

    async def is_idle(self):
        thread, engine = self.service.thread, self.service.engine
        for _ in range(1000):
            if not (thread.num_running or thread.num_queued or engine.has_work or engine.worker.num_open):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("requests are still in the engine")

    def assert_empty(self):
        """Nothing of any visit is left."""
        service = self.service
        assert service.thread.is_alive
        assert dict(service.engine.faults.counts) == {}
        assert not service._generations
        assert not service._writing
        assert not service.conversations
        assert all(record.body is not None for record in service.idempotency._records.values())
        service.engine.parts.integrity.check()


async def stay_beside(live, choose, ways, errors):
    """Visit by visit; ``choose`` picks await points of a case out of all it has, ``ways`` say who ends it there."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(counting)
    loop.set_exception_handler(lambda _, context: errors.append(context))
    hotel, until = Hotel(live), asyncio.Event()
    await hotel.service.start()
    await hotel.furnish()
    until.set()
    wanted = (await hotel.steady(until))[0]
    until.clear()
    steady = asyncio.ensure_future(hotel.steady(until))
    visits = 0
    for name, make in CASES.items():
        if name == "delete all":
            continue  # it takes the others' rooms
        whole = await hotel.visit(make)
        assert whole.status in (200, 201, 400, 404), (name, whole.status, whole.content)
        for at in choose(whole.points):
            for is_cancelled in ways:
                await hotel.visit(make, at=at, is_cancelled=is_cancelled)
                visits += 1
    until.set()
    assert set(await steady) == {wanted}
    for at in choose((await hotel.visit(CASES["delete all"])).points):
        await hotel.visit(CASES["delete all"], at=at)
    await hotel.is_idle()
    await asyncio.sleep(0)
    hotel.assert_empty()
    assert (await hotel.ask(*response(conversation=fresh()))).status == 200
    await hotel.service.stop()
    return visits


@pytest.fixture
def own(tmp_path, request):
    disk = {"session_dir": str(tmp_path)} if request.param else {}
    return start(EngineConfig(kv_cache_memory=2**28, max_num_batched_tokens=256, **disk))


def check(live, choose, ways):
    errors = []
    visits = asyncio.run(stay_beside(live, choose, ways, errors))
    assert not errors, errors[0]
    return visits


@pytest.mark.parametrize("own", [False], indirect=True)
@pytest.mark.parametrize("is_cancelled", [False, True])
def test_going_at_some_points(own, is_cancelled):
    rng = random.Random(is_cancelled)
    assert check(own, lambda points: [rng.randint(1, points)], [is_cancelled]) > 30


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], indirect=True, ids=["memory", "disk"])
def test_going_at_every_point(own):
    assert check(own, lambda points: range(1, points + 1), [False, True]) > 500
