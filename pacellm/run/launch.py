"""Starts the processes of a tensor-parallel model, and watches over them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

from pacellm.errors import ConfigError, EngineDead
from pacellm.model.load import LoadedModel, load
from pacellm.model.ranks import Ranks
from pacellm.run.parallel import follow, tell

logger = logging.getLogger("pacellm.engine")
_PARENT_BEAT = 1.0  # seconds between looks whether the leader lives


class Team:
    """The leader's model and the processes that hold the other parts.

    Args:
        on_lost: called once, in a thread, when a process ends that should not have.
    """

    def __init__(self, model: LoadedModel, processes: Sequence[BaseProcess], on_lost: Callable[[str], None]) -> None:
        self.model, self.processes, self._on_lost = model, processes, on_lost
        self._closing = False
        threading.Thread(target=self._watch, name="pacellm-ranks", daemon=True).start()

    def _watch(self) -> None:
        ended = wait([process.sentinel for process in self.processes])
        if self._closing:
            return
        for number, process in enumerate(self.processes, start=1):
            if process.sentinel in ended:
                process.join()
                self._on_lost(f"tensor-parallel rank {number} ended with status {process.exitcode}")
                return

    def close(self) -> None:
        """End all processes."""
        self._closing = True
        assert self.model.ranks is not None
        try:
            tell(self.model.ranks, None)
        except EngineDead as error:
            logger.info("a rank was gone already: %s", error)
        self.model.ranks.leave()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def start(
    path: str,
    size: int,
    *,
    dtype: str,
    device: str,
    on_lost: Callable[[str], None],
    prepare: Callable[[], None] | None = None,
) -> Team:
    """Load a checkpoint over ``size`` processes, this one included.

    Args:
        on_lost: called once, in a thread, when a process ends that should not have.
        prepare: called in each of the other processes first; what sets their logs up.

    Raises:
        ConfigError: not so many devices. ModelError: it cannot be split so.
    """
    if device.startswith("cuda") and torch.cuda.device_count() < size:
        raise ConfigError(
            f"tensor_parallel_size {size} wants as many GPUs; there are {torch.cuda.device_count()}",
            param="tensor_parallel_size",
        )
    address = f"tcp://127.0.0.1:{_free_port()}"
    context = multiprocessing.get_context("spawn")
    processes = []
    for rank in range(1, size):
        process = context.Process(
            target=_follower, args=(prepare, rank, size, address, path, dtype, device), daemon=True
        )
        process.start()
        processes.append(process)
    try:
        model = load(path, dtype=dtype, device=_own(device, 0), ranks=Ranks(0, size, address, _own(device, 0)))
    except BaseException:
        for process in processes:
            process.kill()
        raise
    return Team(model, processes, on_lost)


def end_service(reason: str, grace: float = 5.0) -> None:
    """What a server does when a rank is lost: say so, let open streams end with an error, and exit with status 1.

    The engine's thread may be stuck in a collective operation that will never complete, so nothing waits for it."""
    logger.critical("%s; the service ends", reason)
    time.sleep(grace)
    os._exit(1)


def _own(device: str, rank: int) -> torch.device:
    return torch.device("cuda", rank) if device.startswith("cuda") else torch.device(device)


def _follower(
    prepare: Callable[[], None] | None, rank: int, size: int, address: str, path: str, dtype: str, device: str
) -> None:
    if prepare is not None:
        prepare()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    own = _own(device, rank)
    ranks = Ranks(rank, size, address, own)
    follow(load(path, dtype=dtype, device=own, ranks=ranks))
    ranks.leave()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_BEAT)
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
