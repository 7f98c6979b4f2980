"""Builds an engine: every part is made here, in one order, and gets the parts that it needs by name.

Nothing is set on a part after it was made, and none knows the engine.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from tokenizers import Tokenizer
from torch import Tensor

from pacellm.config import EngineConfig
from pacellm.engine import sizing
from pacellm.engine.admission import Admission
from pacellm.engine.admission_plan import AdmissionPlanner
from pacellm.engine.answer import Answers
from pacellm.engine.background import Background
from pacellm.engine.cache_manager import CacheManager
from pacellm.engine.committer import Committer
from pacellm.engine.deadlines import Deadlines
from pacellm.engine.device import attention_kernel, linear_products, new_pool, new_runner
from pacellm.engine.dispatcher import Dispatcher
from pacellm.engine.executor import Executor
from pacellm.engine.fingerprint import fingerprint_of, former_fingerprints
from pacellm.engine.integrity import IntegrityCheck
from pacellm.engine.pace import Pace
from pacellm.engine.queues import RequestQueues
from pacellm.engine.recovery import Recovery
from pacellm.engine.request_state import Outbox, Requests
from pacellm.engine.scheduler import Scheduler
from pacellm.engine.stats import EngineStats
from pacellm.engine.step import Copy
from pacellm.engine.validation import RequestValidator
from pacellm.experts.forward import check_density, detach
from pacellm.faults import Faults
from pacellm.kv.blocks import BlockAllocator
from pacellm.kv.history import HistoryMemory
from pacellm.kv.prefix_cache import PrefixCache
from pacellm.memory.pool import BankPool
from pacellm.model.attention.plan import PrefillKernel
from pacellm.model.fused import fuse
from pacellm.model.linear import Products
from pacellm.model.load import LoadedModel
from pacellm.model.patch import unpatch
from pacellm.model.retrieval import Retrieval
from pacellm.model.rotation import learn_rotations, make_precise
from pacellm.recall.recaller import Recaller
from pacellm.recall.views import Views
from pacellm.run.runner import Runner
from pacellm.sessions.budget import DiskBudget
from pacellm.sessions.claims import DirectoryClaims
from pacellm.sessions.deletions import Deletions
from pacellm.sessions.device_state import DeviceState
from pacellm.sessions.disk import Disk
from pacellm.sessions.disk_usage import DiskUsage
from pacellm.sessions.eviction import Eviction
from pacellm.sessions.files import SessionFiles
from pacellm.sessions.host_memory import HostMemory
from pacellm.sessions.lookup import SessionLookup
from pacellm.sessions.metadata import SessionMetadata
from pacellm.sessions.mover import Mover
from pacellm.sessions.operation_queue import OperationQueue
from pacellm.sessions.operations import SessionOperations
from pacellm.sessions.records import Records
from pacellm.sessions.snapshots import Snapshots
from pacellm.sessions.stats import MoverStats
from pacellm.sessions.store import SessionStore
from pacellm.sessions.worker import Worker
from pacellm.view import BLOCK


@dataclass(frozen=True)
class Device:
    """What lies on the device, and what computes there.

    Attributes:
        config: resolved.
        kernel: of prompts' chunks on a GPU. products: linear layers on a CPU.
        allocator, pool: KV blocks and banks; pool is None without PA and layout.
    """

    model: LoadedModel
    config: EngineConfig
    kernel: PrefillKernel | None
    products: Products
    allocator: BlockAllocator
    pool: BankPool | None
    runner: Runner

    @property
    def block_bytes(self) -> int:
        """KV bytes of one block over all layers."""
        return BLOCK * self.model.bytes_per_token


@dataclass(frozen=True)
class Sessions:
    """What outlives requests, and the tiers where it lies."""

    store: SessionStore
    worker: Worker
    mover: Mover
    eviction: Eviction


@dataclass(frozen=True)
class Scheduling:
    """What decides the steps."""

    queues: RequestQueues
    prefix_cache: PrefixCache
    cache: CacheManager
    scheduler: Scheduler
    recaller: Recaller | None


@dataclass(frozen=True)
class Operating:
    """What clients do to sessions as things."""

    queue: OperationQueue
    sessions: SessionOperations
    snapshots: Snapshots


@dataclass(frozen=True)
class Parts:
    """Everything that an engine is made of.

    Attributes:
        requests: by id. outbox: their events of this step.
        wakeup: notified when the worker has results.
        records: gives how sessions are written; the weights are hashed when first asked. None where they are not.
    """

    device: Device
    sessions: Sessions
    scheduling: Scheduling
    operating: Operating
    requests: Requests
    outbox: Outbox
    validator: RequestValidator
    integrity: IntegrityCheck
    recovery: Recovery
    answers: Answers
    background: Background
    dispatcher: Dispatcher
    executor: Executor
    committer: Committer
    stats: EngineStats
    faults: Faults
    wakeup: threading.Condition
    records: Callable[[], Records] | None


def build(model: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None) -> Parts:
    """An engine's parts; the model is patched where the config says so.

    Raises:
        ConfigError: the config does not fit the model.
        ModelError: the model cannot be patched.
    """
    stats, faults, wakeup = EngineStats(), Faults(), threading.Condition()
    device = new_device(model, config)
    # a model that is split over processes has each session in parts: these are not written
    records = None if model.ranks is not None else cache(partial(_new_records, device, tokenizer))
    # its thread must not keep an engine that nobody else keeps
    worker = Worker(partial(faults.note, "worker"), wakeup)
    sessions = new_sessions(device.config, device.allocator, device.pool, device.runner.slabs, worker, model, records)
    views = new_views(device, sessions.mover.host.history)
    scheduling = new_scheduling(
        device.config, device.allocator, device.pool, sessions, device.runner.copy, views=views,
        recaller=None if views is None else new_recaller(device, views),
    )  # fmt: skip
    requests: Requests = {}
    outbox, queues, scheduler = Outbox(), scheduling.queues, scheduling.scheduler
    prefix_cache, files = scheduling.prefix_cache, sessions.mover.files
    integrity = IntegrityCheck(device.allocator, device.pool, queues, sessions.store, prefix_cache)
    recovery = Recovery(
        requests, outbox, queues, scheduler, sessions.store, device.allocator, prefix_cache, scheduling.cache,
        device.runner, integrity, stats, faults,
    )  # fmt: skip
    answers = Answers(
        requests, outbox, scheduler, scheduler.admission, sessions.store, files, device.pool, recovery, stats, faults,
        eos=model.eos_token_ids,
    )  # fmt: skip
    operating = _new_operating(device, sessions, scheduling, recovery, faults, records)
    return Parts(
        device=device,
        sessions=sessions,
        scheduling=scheduling,
        operating=operating,
        requests=requests,
        outbox=outbox,
        validator=RequestValidator(model, device.config, device.pool),
        integrity=integrity,
        recovery=recovery,
        answers=answers,
        background=Background(worker, sessions.store, files, operating.sessions, operating.queue, faults),
        dispatcher=Dispatcher(scheduler, queues, sessions.mover.claims, worker, requests, outbox, recovery),
        executor=Executor(
            device.runner, scheduler, operating.queue, recovery, stats,
            may_run_ahead=device.config.async_scheduling, eos=model.eos_token_ids,
        ),
        committer=Committer(
            answers, scheduler, scheduling.cache, recovery, outbox, stats, faults,
            integrity if device.config.check_integrity else None, scheduling.recaller, device.pool,
        ),
        stats=stats,
        faults=faults,
        wakeup=wakeup,
        records=records,
    )  # fmt: skip


def new_device(model: LoadedModel, config: EngineConfig) -> Device:
    """The model made ready, and memory for KV and banks.

    Raises:
        ConfigError, ModelError: as for :func:`build`.
    """
    detach(model.module)
    unpatch(model.module)
    if model.ranks is None:
        fuse(model.module, joins=not config.deterministic)
    else:
        sizing.check_parallel(config)
    check_density(config.ce_density, model.module, model.layout, "ce_density")
    kernel = attention_kernel(model, config)
    products = linear_products(model, config)
    config = sizing.resolve(model, config)
    num_blocks = (config.kv_cache_memory or 0) // (BLOCK * model.bytes_per_token)
    pool = new_pool(model, config) if config.pa or model.layout is not None else None
    runner = new_runner(model, pool, num_blocks, config, kernel, products.rows)
    return Device(model, config, kernel, products, BlockAllocator(num_blocks), pool, runner)


def new_sessions(
    config: EngineConfig,
    allocator: BlockAllocator,
    pool: BankPool | None,
    slabs: list[Tensor],
    worker: Worker,
    model: LoadedModel,
    get_records: Callable[[], Records] | None,
) -> Sessions:
    """Sessions, with those that lie in the session directory.

    Raises:
        ConfigError: the session directory cannot be written.
    """
    block_bytes = BLOCK * model.bytes_per_token
    host = HostMemory(sizing.host_memory(model, config), worker)
    store = SessionStore(
        allocator,
        pool,
        host,
        block_bytes=block_bytes,
        ttl=config.session_ttl,
        # a folded session's banks leave the device, which those of a tensor-parallel model cannot
        fold_after=4 * (config.max_model_len or 0) if model.ranks is None else sys.maxsize,
    )
    disk = Disk(config.session_dir, sync=config.session_sync) if config.session_dir is not None else None
    records = get_records() if disk is not None and get_records is not None else None
    usage, stats = DiskUsage(disk), MoverStats()
    claims = DirectoryClaims(store, worker, usage, disk, records)
    files: SessionFiles | None = None
    if disk is not None and records is not None:
        deletions = Deletions(disk, worker, claims, usage, stats)
        budget = DiskBudget(config.session_disk_size, usage, store, claims, worker, disk, deletions)
        give_way = weakref.WeakMethod(budget.make_room)  # its thread keeps the worker, which keeps nothing else
        worker.make_room = lambda: (found := give_way()) is not None and found()
        files = SessionFiles(store, worker, disk, records, usage, budget, deletions, stats)
        files.find()
    mover = Mover(
        store, allocator, pool, slabs, bytes_per_token=model.bytes_per_token, worker=worker, host=host, claims=claims,
        files=files, stats=stats,
    )  # fmt: skip
    eviction = Eviction(
        store,
        mover,
        pool,
        block_bytes=block_bytes,
        memory=config.session_memory or 0,
        max_rows=pool.num_rows - config.max_num_seqs if pool is not None else 0,
        log_memory=config.session_log_memory,
    )
    return Sessions(store, worker, mover, eviction)


def new_scheduling(
    config: EngineConfig,
    allocator: BlockAllocator,
    pool: BankPool | None,
    sessions: Sessions,
    copy_kv: Callable[[list[Copy]], None],
    clock: Callable[[], float] = time.monotonic,
    views: Views | None = None,
    recaller: Recaller | None = None,
) -> Scheduling:
    """Queues, and who decides what runs.

    Args:
        config: resolved.
        copy_kv: copies KV between slots now.
        clock: seconds.
        views: puts what is called back into KV memory; None where contexts end where the model's does.
        recaller: chooses it.
    """
    store, queues, pace = sessions.store, RequestQueues(), Pace(config.working_memory)
    prefix_cache = PrefixCache(allocator, pool, segment=config.bank.segment, max_seqs=config.max_num_seqs)
    cache = CacheManager(
        allocator, pool, store, sessions.eviction, prefix_cache, sessions.mover.histories, queues, copy_kv, views
    )
    preset = config.bank.preset if config.pa else None
    planner = AdmissionPlanner(prefix_cache, preset=preset, density=config.ce_density, budget=config.budget)
    deadlines = Deadlines(config, queues, store, planner, pace, clock)
    admission = Admission(config, queues, store, sessions.mover, cache, prefix_cache, planner, deadlines, clock)
    scheduler = Scheduler(
        config, queues, store, sessions.eviction, cache, prefix_cache, admission, deadlines, pace, recaller
    )  # fmt: skip
    return Scheduling(queues, prefix_cache, cache, scheduler, recaller)


def new_recaller(device: Device, views: Views) -> Recaller:
    """What chooses what is called back."""
    config = device.config
    return Recaller(
        config.working_memory_index or ("lexical",), device.model.retrieval or Retrieval(), views.rotations,
        device.runner.slabs,
        block=config.working_memory_block, room=config.working_memory_recall, distance=config.working_memory_window,
    )  # fmt: skip


def new_views(device: Device, memory: HistoryMemory) -> Views | None:
    """What puts parts of histories into KV memory; None without working memory.

    Raises:
        ConfigError: the model's keys cannot be shown elsewhere than where they stood.
    """
    model, budget = device.model, device.config.budget
    if budget is None:
        return None
    rotations = learn_rotations(model)
    make_precise(model.module, model.context_length)
    return Views(device.allocator, device.runner.slabs, model.windows, rotations, memory)


def _new_operating(
    device: Device,
    sessions: Sessions,
    scheduling: Scheduling,
    recovery: Recovery,
    faults: Faults,
    records: Callable[[], Records] | None,
) -> Operating:
    store, mover, prefix_cache = sessions.store, sessions.mover, scheduling.prefix_cache
    lookup = SessionLookup(store, mover.claims, has_directory=mover.files is not None)
    metadata = SessionMetadata(
        device.pool,
        None if mover.files is None else mover.files.usage,
        block_bytes=device.block_bytes,
        slots=device.config.bank.bank_size,
    )
    states = DeviceState(
        store, mover, device.allocator, device.pool, device.runner.slabs,
        has_room=scheduling.cache.has_room, copy_kv=device.runner.copy,
    )  # fmt: skip
    operations = SessionOperations(
        store, mover, lookup, metadata, states, sessions.eviction, prefix_cache, recovery.end_requests_of
    )
    secret = mover.files.disk.secret if mover.files is not None else None
    snapshots = Snapshots(
        store, lookup, metadata, states, operations, prefix_cache, sessions.worker, records, secret
    )  # fmt: skip
    return Operating(OperationQueue(faults), operations, snapshots)


def _new_records(device: Device, tokenizer: Tokenizer | None) -> Records:
    model, config = device.model, device.config
    return Records(
        fingerprint_of(model, config, tokenizer),
        vocab_size=model.vocab_size,
        slabs=device.runner.slabs,
        like=device.pool.banks(0) if device.pool is not None else {},
        max_tokens=config.max_model_len or 0,
        codes=device.runner.codes,
        former=partial(former_fingerprints, model, config, tokenizer),
    )
