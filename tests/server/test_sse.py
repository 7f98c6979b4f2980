"""A stream whose client is gone: its request is closed, whatever moment the client chose."""

import asyncio

import pytest

from pacellm.server.auth import Caller
from pacellm.server.event_queue import EventQueue
from pacellm.server.generation import Generation
from pacellm.server.sse import EventStream
from pacellm.types import Admitted, Delta, GenerationRequest

SCOPE = {"type": "http"}


class Connection:
    """A client's side: when it reads, and when it leaves."""

    def __init__(self):
        self.left, self.is_full = asyncio.Event(), False

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if self.is_full:
            await asyncio.Event().wait()


class Forgetting:
    """The part of a service that a generation talks to."""

    def __init__(self):
        self.aborted = []

    def forget(self, generation, *, abort):
        self.aborted.append(abort)


def serve(scenario):
    """Stream a generation's events while ``scenario(connection, generation)`` plays; what forget was told."""

    async def play():
        connection, service = Connection(), Forgetting()
        events = EventQueue()
        generation = Generation(service, GenerationRequest("one", [1]), Caller("default", "r", 0.0), events)

        async def source():
            while True:
                yield repr(await events.get(60)).encode()

        response = asyncio.create_task(
            EventStream(source(), generation.close)(SCOPE, connection.receive, connection.send)
        )
        await scenario(connection, generation)
        await asyncio.wait_for(response, 10)
        return service.aborted

    return asyncio.run(play())


@pytest.mark.parametrize("turns", range(8))
def test_leaving_as_an_event_arrives(turns):
    async def scenario(connection, generation):
        await asyncio.sleep(0.01)
        connection.left.set()
        for _ in range(turns):  # of the event loop
            await asyncio.sleep(0)
        generation.push(Delta("a", (1,)))

    assert serve(scenario) == [True]


def test_leaving_before_the_first_byte():
    async def scenario(connection, generation):
        connection.left.set()

    assert serve(scenario) == [True]


def test_leaving_while_the_connection_is_blocked():
    async def scenario(connection, generation):
        await asyncio.sleep(0.01)
        connection.is_full = True
        generation.push(Admitted("none", 0))
        await asyncio.sleep(0.01)
        connection.left.set()

    assert serve(scenario) == [True]
