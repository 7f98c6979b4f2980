"""How sessions are routed at 10, 100 and 1,000 replicas: ``python load_tests/routing_simulation.py``.

No server and no Ray: the router's own table (deploy/ray/table.py) and a hash ring of 100 virtual nodes, as Ray Serve's,
are fed the same events. ``--per-replica`` sessions a replica, each asked once a round, in this order: rounds at
rest, half as many replicas again, a fifth of the sessions ends and others begin, back to the number before, a tenth of
the replicas crash and others take their place. *Strayed* is a session asked of another replica than the one that holds
it, although that one runs; *moved* one whose holder has gone; *imbalance* the fullest replica's sessions over the mean.
Reports are taken between rounds. ``--picture FILE`` draws it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from deploy.ray.table import SessionTable, write_report

_VIRTUAL = 100


class Ring:
    """Consistent hashing with virtual nodes."""

    def __init__(self, replicas: list[str]) -> None:
        points = sorted((_hash(f"{replica}:{number}"), replica) for replica in replicas for number in range(_VIRTUAL))
        self._hashes, self._replicas = [point[0] for point in points], [point[1] for point in points]

    def __call__(self, key: int) -> str:
        """The replica of a session."""
        return self._replicas[bisect.bisect_right(self._hashes, _hash(f"{key:016x}")) % len(self._hashes)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Fleet:
    """Replicas and what they hold.

    Args:
        uses_table: route by reports before the ring, or by the ring alone.
    """

    def __init__(self, count: int, keys: list[int], *, uses_table: bool) -> None:
        self.keys, self._uses_table = keys, uses_table
        self._made = 0
        self.held: dict[str, dict[int, int]] = {}  # session to generation, by replica
        self.where: dict[int, str] = {}  # who holds the latest
        self.generation = dict.fromkeys(keys, 0)
        self.table, self._clock = SessionTable(clock=lambda: self._now), 0.0
        self._now = 0.0
        self.update_seconds: list[float] = []
        self.route_seconds: list[float] = []
        self.add(count)

    def add(self, count: int) -> None:
        """New replicas, which hold nothing."""
        for _ in range(count):
            self.held[f"replica-{self._made}"] = {}
            self._made += 1
        self.report()

    def remove(self, names: list[str]) -> None:
        """Replicas that go, drained or killed."""
        for name in names:
            del self.held[name]
        self.report()

    def report(self) -> None:
        """Every router hears of every replica."""
        reports = {name: write_report(held.items()) for name, held in self.held.items()}
        started = time.perf_counter()
        if self._uses_table:
            self.table.update(reports)  # type: ignore[arg-type]
        self.update_seconds.append(time.perf_counter() - started)
        self.report_bytes = sum(map(len, reports.values()))
        self.ring = Ring(list(self.held))

    def round(self) -> dict[str, int]:
        """Every session is asked once: how many strayed, and how many had lost their holder."""
        strayed = moved = 0
        self._now += 10.0
        started = time.perf_counter()
        for key in self.keys:
            target = (self.table.holder(key) if self._uses_table else None) or self.ring(key)
            before = self.where.get(key)
            if before is not None and before != target:
                moved, strayed = moved + (before not in self.held), strayed + (before in self.held)
            if self._uses_table:
                self.table.sent(key, target)
            self.generation[key] += 1
            self.held[target][key] = self.generation[key]  # type: ignore[index]
            self.where[key] = target  # type: ignore[assignment]
        self.route_seconds.append((time.perf_counter() - started) / len(self.keys))
        self.report()
        return {"strayed": strayed, "moved": moved}

    def renew(self, share: float, rng: random.Random) -> None:
        """So many sessions end, and as many begin."""
        for number in rng.sample(range(len(self.keys)), int(share * len(self.keys))):
            key = self.keys[number]
            self.held.get(self.where.pop(key), {}).pop(key, None)
            self.keys[number] = rng.getrandbits(64)
            self.generation[self.keys[number]] = 0
        self.report()

    def imbalance(self) -> float:
        """Sessions of the fullest replica over the mean."""
        counts = dict.fromkeys(self.held, 0)
        for name in self.where.values():
            counts[name] = counts.get(name, 0) + 1
        return max(counts.values()) * len(self.held) / len(self.where)


def simulate(replicas: int, per_replica: int, *, uses_table: bool) -> dict[str, Any]:
    """All events at one size."""
    rng = random.Random(0)
    keys = [rng.getrandbits(64) for _ in range(replicas * per_replica)]
    fleet = Fleet(replicas, keys, uses_table=uses_table)
    fleet.round()
    found: dict[str, Any] = {"imbalance": {"at rest": round(fleet.imbalance(), 3)}}

    def event(name: str, happen: Callable[[], None]) -> None:
        happen()
        found[name] = fleet.round()
        again = fleet.round()
        found[name]["strayed_in_the_next_round"] = again["strayed"]
        found["imbalance"][name] = round(fleet.imbalance(), 3)

    event("rest", lambda: None)
    event("scaled up by half", lambda: fleet.add(replicas // 2))
    fleet.renew(0.2, rng)
    fleet.round()
    found["imbalance"]["a fifth of the sessions new"] = round(fleet.imbalance(), 3)
    event("scaled back", lambda: fleet.remove(list(fleet.held)[replicas:]))  # Ray takes the youngest away

    def crash() -> None:
        fleet.remove(rng.sample(list(fleet.held), max(1, replicas // 10)))
        fleet.round()
        fleet.add(max(1, replicas // 10))

    dead = dict(fleet.where)
    event("a tenth crashed and was replaced", crash)
    found["a tenth crashed and was replaced"]["moved"] = sum(name not in fleet.held for name in dead.values())
    if uses_table:
        found["report_bytes_of_all"] = fleet.report_bytes
        found["table_bytes"] = table_bytes(fleet.table)
        found["update_ms"] = round(1e3 * statistics.median(fleet.update_seconds), 2)
    found["route_us"] = round(1e6 * statistics.median(fleet.route_seconds), 2)
    return found


def table_bytes(table: SessionTable) -> int:
    """Bytes of a table, of its numbers and dictionaries all together."""
    seen: set[int] = set()

    def size(thing: Any) -> int:
        if id(thing) in seen:
            return 0
        seen.add(id(thing))
        own = sys.getsizeof(thing)
        if isinstance(thing, dict):
            return own + sum(size(key) + size(value) for key, value in thing.items())
        if isinstance(thing, tuple):
            return own + sum(size(part) for part in thing)
        return own

    return sum(size(part) for part in (table._reports, table._holders, table._sent))


def draw(rows: dict[str, dict[str, Any]], sizes: list[int], path: str) -> None:
    """Strayed sessions and imbalance by size, table beside ring."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    events = ("scaled up by half", "scaled back", "a tenth crashed and was replaced")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for way, offset, colour in (("table", -0.2, "#1f6f8b"), ("ring", 0.2, "#c9793a")):
        shares = [100 * rows[f"{size} {way}"][event]["strayed"] / rows[f"{size} {way}"]["sessions"]
                  for event in events for size in sizes]  # fmt: skip
        axes[0].bar([place + offset for place in range(len(shares))], shares, 0.4, label=way, color=colour)
        peaks = [rows[f"{size} {way}"]["imbalance"][event] for event in ("at rest", *events[:2]) for size in sizes]
        axes[1].bar([place + offset for place in range(len(peaks))], peaks, 0.4, label=way, color=colour)
    for axis, names, title in (
        (axes[0], ("up by\nhalf", "back", "a tenth\ncrashed"), "sessions strayed from a replica that runs, %"),
        (axes[1], ("at rest", "up by\nhalf", "back"), "fullest replica, sessions over the mean"),
    ):
        axis.set_xticks(range(3 * len(sizes)), [f"{name}\n{size:,}" for name in names for size in sizes], fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--per-replica", type=int, default=250)
    parser.add_argument("--picture", help="a PNG file")
    parser.add_argument("--small", action="store_true", help="a version of a second")
    args = parser.parse_args(arguments)
    if args.small:
        args.replicas, args.per_replica = [10], 20
    rows: dict[str, dict[str, Any]] = {}
    for size in args.replicas:
        for way in ("table", "ring"):
            row = simulate(size, args.per_replica, uses_table=way == "table")
            rows[f"{size} {way}"] = {"sessions": size * args.per_replica, **row}
            print(f"{size} {way}", rows[f"{size} {way}"], flush=True)
    if args.picture:
        draw(rows, args.replicas, args.picture)
    failures = [f"{name}: sessions strayed from a replica that runs" for name, row in rows.items()
                if name.endswith("table") and any(row[one]["strayed"] for one in row if "scaled" in one)]  # fmt: skip
    print(json.dumps({"bench": "routing", "per_replica": args.per_replica, "failures": failures, "rows": rows}))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
