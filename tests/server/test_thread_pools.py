"""Work off the event loop: short beside long, keys in turn, and nothing lost where nobody waits any more."""

import asyncio
import threading

import pytest

from pacellm.server.thread_pools import SHORT, FairSemaphore, FairThreadPool, ThreadPools
from tests.server.conftest import NAME


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def taker(slots, key, order):
    await slots.take(key)
    order.append(key)


def waiting(slots, keys, order):
    return [asyncio.create_task(taker(slots, key, order)) for key in keys]


def test_keys_take_turns():
    async def run():
        slots, order = FairSemaphore(1), []
        await slots.take("first")
        tasks = waiting(slots, ["a", "a", "a", "b", "c", "b"], order)
        await settle()
        slots.leave("first")
        for number in range(6):
            await settle()
            assert len(order) == number + 1
            slots.leave(order[-1])
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(run()) == ["a", "b", "c", "a", "b", "a"]


def test_a_key_leaves_a_place_to_others():
    async def run():
        slots, order = FairSemaphore(3, each=2), []
        tasks = waiting(slots, ["a"] * 5, order)
        await settle()
        assert order == ["a", "a"]
        tasks += waiting(slots, ["b"], order)
        await settle()
        assert order == ["a", "a", "b"]
        while len(order) < 6:
            slots.leave("a")
            await settle()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_who_stops_waiting_takes_no_place():
    async def run():
        slots, order = FairSemaphore(1), []
        await slots.take("x")
        gone, just, last = waiting(slots, ["a", "a", "b"], order)
        await settle()
        gone.cancel()
        slots.leave("x")  # the second of a has its turn, and leaves before it hears of it
        just.cancel()
        await asyncio.gather(gone, just, return_exceptions=True)
        await settle()
        assert order == ["b"]
        await last
        slots.leave("b")
        await asyncio.wait_for(slots.take("c"), 1)

    asyncio.run(run())


def test_short_work_does_not_wait_for_long_work():
    async def run():
        pools, release = ThreadPools(2), threading.Event()
        long = [asyncio.create_task(pools.of(SHORT + 1).run("a", release.wait)) for _ in range(20)]
        await settle()
        assert await asyncio.wait_for(pools.of(SHORT).run("a", lambda: 5), 10) == 5
        assert await asyncio.wait_for(pools.bulk.run("a", lambda: 6), 10) == 6
        release.set()
        assert all(await asyncio.gather(*long))
        pools.close()

    asyncio.run(run())


def test_work_that_nobody_waits_for_keeps_its_place_until_it_ends():
    async def run():
        pool, release, running = FairThreadPool("x", 1), threading.Event(), threading.Event()

        def work():
            running.set()
            release.wait()

        first = asyncio.create_task(pool.run("a", work))
        while not running.is_set():
            await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(pool.run("b", lambda: 7))
        await settle()
        assert not second.done()
        assert not pool._pool._work_queue.qsize()  # it waits for its turn, not in the threads' queue
        release.set()
        assert await asyncio.wait_for(second, 10) == 7
        with pytest.raises(ZeroDivisionError):
            await pool.run("a", lambda: 1 / 0)
        assert await asyncio.wait_for(pool.run("a", lambda: 8), 10) == 8
        pool.close()

    asyncio.run(run())


def test_a_short_prompt_is_served_while_long_work_waits(live):
    """Long texts, snapshots and grammars of one key do not hold up another's short prompt."""
    release, pools = threading.Event(), live.service.pools

    async def fill():
        for pool in (pools.long, pools.bulk, pools.grammars):
            for _ in range(4):
                held.append(asyncio.ensure_future(pool.run("other", release.wait)))
        await asyncio.sleep(0)

    held = []
    asyncio.run_coroutine_threadsafe(fill(), live.service._loop).result(10)
    try:
        body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        assert live.http.post("/v1/chat/completions", json=body).status_code == 200
        assert live.http.post("/tokenize", json={"model": NAME, "prompt": "hello"}).status_code == 200
        formed = {**body, "max_tokens": 9, "structured_outputs": {"regex": "[0-9]{2}"}}
        assert live.http.post("/v1/chat/completions", json=formed).json()["choices"][0]["finish_reason"] == "stop"
    finally:
        release.set()
