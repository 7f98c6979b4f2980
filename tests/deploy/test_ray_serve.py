"""PaceLLM on a real, small Ray cluster: sessions stay where they are, and come back when their replica was killed.

``make ray``; needs ``pip install -e '.[ray]'``. The cluster listens on loopback, on ports of its own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from deploy.ray.table import digest
from pacellm.demo.local import sample_document

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="Ray Serve is an extra: pip install -e '.[ray]'")

ROOT = Path(__file__).parent.parent.parent
RAY, SERVE = (sys.executable, "-m", "ray.scripts.scripts"), (sys.executable, "-m", "ray.serve.scripts")
SESSIONS = 12
FOLLOWING = {"resident", "restored", "replayed"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Ray with one node, and the application on it."""

    def __init__(self, folder):
        self.folder, self.port, self.head, self.board = folder, free_port(), free_port(), free_port()
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0",
                            "OMP_NUM_THREADS": "1",
                            "RAY_TMPDIR": str(folder), "RAY_raylet_start_wait_time_s": "180",
                            "RAY_ADDRESS": f"127.0.0.1:{self.head}"}  # fmt: skip
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def command(self, *words, seconds=180):
        """A command's standard output."""
        done = subprocess.run([str(word) for word in words], env=self.environment, cwd=ROOT, timeout=seconds,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self):
        self.command(*RAY, "start", "--head", "--node-ip-address", "127.0.0.1", "--port", self.head, "--num-cpus", 8,
                     "--object-store-memory", 80 * 2**20, "--include-dashboard=true",
                     "--dashboard-host", "127.0.0.1",
                     "--dashboard-port", self.board, "--temp-dir", self.folder)  # fmt: skip

    def stop(self):
        """End the processes of this cluster alone."""
        self.http.close()
        mark = str(self.folder).encode()
        for pid in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
            try:
                if mark in Path(f"/proc/{pid}/environ").read_bytes() and pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue

    def deploy(self, replicas):
        """``serve deploy`` with so many replicas; returns when they run."""
        config = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [
                {
                    "name": "pacellm",
                    "route_prefix": "/",
                    "import_path": "deploy.ray.app:build_app",
                    "args": {
                        "report_seconds": 0.5,
                        "serve": ["--session-dir", str(self.folder / "sessions"), "--session-sync", "--max-num-seqs", 4,
                                  "--max-model-len", 8192, "--kv-cache-memory-bytes", "256M", "--log-level", "warning"],
                    },
                    "deployments": [
                        {"name": "PaceLLM", "num_replicas": replicas, "max_ongoing_requests": 64,
                         "graceful_shutdown_timeout_s": 60, "ray_actor_options": {"num_cpus": 1}}
                    ],
                }
            ],
        }  # fmt: skip
        file = self.folder / "serve.json"
        file.write_text(json.dumps(config))
        self.command(*SERVE, "deploy", file, "-a", f"http://127.0.0.1:{self.board}")
        self.until(lambda: len(self.replicas()) == replicas and self.is_running())

    def is_running(self):
        shown = self.command(*SERVE, "status", "-a", f"http://127.0.0.1:{self.board}")
        assert "DEPLOY_FAILED" not in shown, shown
        return "status: RUNNING" in shown and "HEALTHY" in shown

    def until(self, condition, seconds=240):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.command(*SERVE, "status", "-a", f"http://127.0.0.1:{self.board}")
            time.sleep(1)

    def replicas(self):
        """{name: {pid, sessions}}."""
        out = self.command(sys.executable, ROOT / "tests/deploy/ray_replicas.py", f"127.0.0.1:{self.head}")
        return json.loads(out.strip().splitlines()[-1])

    def ask(self, session, messages):
        body = {"messages": messages, "max_tokens": 16, "temperature": 0}
        answer = self.http.post("/v1/chat/completions", json=body, headers={"X-Session-ID": session})
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("r"))
    try:
        made.start()
        made.deploy(2)
        yield made
    finally:
        made.stop()


class Talk:
    """A session that asks about one document, round after round."""

    def __init__(self, cluster, name, document):
        self.cluster, self.name, self.document = cluster, name, document
        self.messages, self.answers = [], []

    def ask(self):
        """What the session was found to be."""
        fact = self.document.facts[len(self.answers) % 2]
        text = fact.question if self.answers else f"{self.document.text}\n\n{fact.question}"
        self.messages.append({"role": "user", "content": text})
        answer = self.cluster.ask(self.name, self.messages)
        self.answers.append(answer["choices"][0]["message"]["content"])
        self.messages.append({"role": "assistant", "content": self.answers[-1]})
        return answer["pacellm"]["session"]


def test_sessions_stay_and_come_back(cluster):
    document = sample_document(1000, seed=0)
    talks = [Talk(cluster, f"s{number}", document) for number in range(SESSIONS)]
    assert [talk.ask() for talk in talks] == ["new"] * SESSIONS
    for _ in range(3):
        assert {talk.ask() for talk in talks} == {"resident"}, "a session strayed between rounds"

    before = cluster.replicas()
    assert sorted(key for one in before.values() for key in one["sessions"]) == sorted(
        digest("default", talk.name) for talk in talks
    )
    assert all(one["sessions"] for one in before.values()), "all sessions on one replica: nothing is shown"

    cluster.deploy(3)
    assert {talk.ask() for talk in talks} == {"resident"}, "scaling up moved a session"
    three = cluster.replicas()
    assert before.keys() < three.keys(), "scaling up restarted a replica"

    cluster.deploy(2)
    left = cluster.replicas()
    gone = set(three) - set(left)
    homeless = {key for name in gone for key in three[name]["sessions"]}
    for talk in talks:
        state = talk.ask()
        expected = {"restored", "replayed"} if digest("default", talk.name) in homeless else {"resident"}
        assert state in expected, f"{talk.name} was {state} when {len(homeless)} sessions lost their replica"

    cluster.until(lambda: all(one["sessions"] for one in cluster.replicas().values()) or homeless)
    victim = max(cluster.replicas().values(), key=lambda one: len(one["sessions"]))
    killed = set(victim["sessions"])
    os.kill(victim["pid"], signal.SIGKILL)
    states = {talk.name: talk.ask() for talk in talks}
    for talk in talks:
        expected = {"restored", "replayed"} if digest("default", talk.name) in killed else {"resident"}
        assert states[talk.name] in expected, f"{talk.name}: {states}"
    cluster.until(lambda: len(cluster.replicas()) == 2)
    assert {talk.ask() for talk in talks} == {"resident"}, "the replica that took a killed one's place moved sessions"

    alone = Talk(cluster, "never-moved", document)
    for _ in talks[0].answers:
        alone.ask()
    assert all(talk.answers == alone.answers for talk in talks), "an answer changed because its session moved"


def test_a_session_whose_files_are_gone_is_lost_not_new(cluster):
    """Nobody is told "new" of a conversation that was there."""
    document = sample_document(1000, seed=1)
    talk = Talk(cluster, "files-gone", document)
    talk.ask()
    holder = next(one for one in cluster.replicas().values() if digest("default", talk.name) in one["sessions"])
    for path in (cluster.folder / "sessions").glob("*/log.safetensors"):
        owner = json.loads((path.parent / "owner.json").read_text())
        if owner["id"] == talk.name:
            path.unlink()
    os.kill(holder["pid"], signal.SIGKILL)
    assert talk.ask() == "lost"
