"""Runs an image's server the way a cluster would and looks whether it behaves; as root, with buildah, on Linux.

    python3 docker/check_image.py pacellm:cpu -- --device cpu

The image's root is read-only, its user has no privileges and cannot gain any, the entry point is process 1, /tmp is
empty, /sessions belongs to root and the group 10001 (as a cluster's fsGroup leaves it). Asked are: the health check of
the image; an answer; a stream that is running when SIGTERM comes, which must end whole; a second start on the same
/sessions, which must know the session. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

URL = "http://127.0.0.1:8000"
_GROUP = 10001
_LOCKED = "setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"


class Container:
    """An image's root file system and configuration."""

    def __init__(self, image: str, sessions: Path) -> None:
        self.name = _output("buildah", "from", image)
        self.root = _output("buildah", "mount", self.name)
        config = json.loads(_output("buildah", "inspect", "--type", "image", image))["Docker"]["config"]
        self.config, self.sessions = config, sessions

    def command(self, arguments: list[str]) -> list[str]:
        """What runs a command in the image, in namespaces of its own for mounts and processes, locked down."""
        root = shlex.quote(self.root)
        script = f"""set -e
            mount --bind {root} {root}
            mount --bind {self.sessions} {root}/sessions
            mount --rbind /dev {root}/dev
            mount -o remount,bind,ro {root}
            mount -t tmpfs tmpfs {root}/tmp
            mount -t proc proc {root}/proc
            exec chroot {root} {_LOCKED} -- {shlex.join(arguments)}"""
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]

    def environment(self) -> dict[str, str]:
        """The image's, and none of this shell's."""
        return dict(line.split("=", 1) for line in self.config["Env"])

    @contextlib.contextmanager
    def serving(self, flags: list[str]) -> Iterator[tuple[int, float]]:
        """The server: the process id of its init, as seen from here, and the seconds until it was ready."""
        begun = time.monotonic()
        command = self.command([*self.config["Entrypoint"], *flags])
        with subprocess.Popen(command, env=self.environment()) as outer:
            try:
                while not _answers("/ready"):
                    if outer.poll() is not None or time.monotonic() > begun + 300:
                        sys.exit("the server did not become ready")
                    time.sleep(0.1)
                children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
                yield int(children[0]), time.monotonic() - begun
            finally:
                if outer.poll() is None:
                    outer.kill()

    def close(self) -> None:
        """Remove it."""
        _output("buildah", "rm", self.name)


def check(image: str, flags: list[str]) -> dict[str, object]:
    """All of it; raises AssertionError where the image does not behave."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = Path(folder)
        os.chown(sessions, 0, _GROUP)
        sessions.chmod(0o2770)
        container = Container(image, sessions)
        try:
            with container.serving(flags) as (init, ready):
                assert Path(f"/proc/{init}/comm").read_text().strip() == "tini"
                inside = subprocess.run(
                    ["nsenter", f"--target={init}", "--mount", "--pid", "--net", f"--root=/proc/{init}/root",
                     *container.config["Healthcheck"]["Test"][1:]], env=container.environment(), check=False,
                )  # fmt: skip
                assert inside.returncode == 0, "the image's HEALTHCHECK fails"
                status = dict(line.split(":\t", 1) for line in Path(f"/proc/{init}/status").read_text().splitlines())
                assert status["Uid"].split()[0] == "10001"
                assert (status["CapEff"], status["NoNewPrivs"]) == ("0000000000000000", "1")
                fact = "The access code of the amber archive is 48213."
                first = _ask(f"{fact}\n\nWhat is the access code of the amber archive?")
                text = first["choices"][0]["message"]["content"]
                assert "48213" in text, text
                streamed, drained = _stream_through_term(init)
            with container.serving(flags) as (init, again):
                second = _ask("What is the access code of the amber archive?")
                os.kill(init, signal.SIGTERM)
                _wait_for_end(init)
        finally:
            container.close()
    state = second["pacellm"]["session"]
    assert state in ("restored", "replayed"), state
    return {
        "image": image,
        "answer": text,
        "ready_seconds": round(ready, 1),
        "ready_again_seconds": round(again, 1),
        "tokens_streamed_through_sigterm": streamed,
        "seconds_from_sigterm_to_exit": round(drained, 2),
        "session_after_restart": state,
    }


def _stream_through_term(init: int) -> tuple[int, float]:
    """SIGTERM once a stream has begun: its tokens, which must be all, and the seconds until the server was gone."""
    body = {"prompt": "The archive", "max_tokens": 400, "ignore_eos": True, "stream": True}
    body |= {"model": "pacellm-demo", "stream_options": {"include_usage": True}}
    lines: list[str] = []
    with _post("/v1/completions", body) as response:
        lines.append(response.readline().decode())
        begun = time.monotonic()
        os.kill(init, signal.SIGTERM)
        ended = threading.Thread(target=_wait_for_end, args=(init,))
        ended.start()
        lines += [line.decode() for line in response]
        ended.join()
    assert "".join(lines).endswith("data: [DONE]\n\n"), lines[-4:]
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert reasons == ["length"], reasons
    return chunks[-1]["usage"]["completion_tokens"], time.monotonic() - begun


def _wait_for_end(process: int) -> None:
    while Path(f"/proc/{process}").exists():
        time.sleep(0.02)


def _ask(question: str) -> dict:
    body = {
        "model": "pacellm-demo",
        "messages": [{"role": "user", "content": question}],
        "session_id": "image",
        "max_tokens": 16,
    }
    with _post("/v1/chat/completions", body) as response:
        return json.loads(response.read())


def _post(path: str, body: dict):
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def _answers(path: str) -> bool:
    try:
        with urllib.request.urlopen(URL + path, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Check the image that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("flags", nargs="*", help="of `pacellm serve`, after --")
    options = parser.parse_args()
    print(json.dumps(check(options.image, options.flags)))


if __name__ == "__main__":
    main()
