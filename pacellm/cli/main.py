"""The command line: commands and their flags. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pacellm import __version__
from pacellm.cli import values
from pacellm.cli.calibrate import add_calibrate
from pacellm.cli.cluster import add_cluster, add_experts
from pacellm.cli.eval import add_eval
from pacellm.cli.serve import add_serve
from pacellm.errors import ConfigError, PaceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = new_parser().parse_args(arguments)
    try:
        return options.run(options)
    except PaceError as error:
        print(f"pacellm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve_options(flags: Sequence[str]) -> argparse.Namespace:
    """The options of ``pacellm serve`` with these flags; what is wrong goes to stderr and ends with SystemExit."""
    return new_parser().parse_args(["serve", *flags])


def new_parser() -> argparse.ArgumentParser:
    """Of all commands and their flags."""
    parser = argparse.ArgumentParser(prog="pacellm", description="Long-context inference with working memory.")
    parser.add_argument("--version", action="version", version=f"pacellm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_serve(commands.add_parser("serve", help="serve a model over OpenAI's API"))
    _add_chat(commands.add_parser("chat", help="talk to a server in the terminal"))
    _add_demo(commands.add_parser("demo", help="ask the bundled model about a long document, over HTTP"))
    _add_convert(commands.add_parser("convert", help="write a checkpoint's directory from a GGUF file"))
    _add_fetch(commands.add_parser("fetch", help="put a small real model into the user's cache"))
    add_calibrate(
        commands.add_parser("calibrate", help="measure what acting banks and fewer experts do to a model's answers")
    )
    add_cluster(commands.add_parser("cluster", help="put a model's FFN neurons into experts: a layout file"))
    add_eval(commands.add_parser("eval", help="ask a server published long-context suites, under several arms"))
    add_experts(commands.add_parser("experts", help="draw which experts fire over a document"))
    return parser


def demo(options: argparse.Namespace) -> int:
    """Start a server on the bundled model, or on a real one, and ask it about a document."""
    if options.model is not None:
        from pacellm.demo.real import show_real
        from pacellm.real_models import resolve

        if options.seed is not None:
            raise ConfigError("--seed is for the bundled model's documents", param="model")
        return show_real(options.model, resolve(options.model), options.tokens, options.serve_arguments)
    from pacellm.demo.show import show

    return show(options.tokens or 200_000, options.seed or 0, options.serve_arguments)


def chat(options: argparse.Namespace) -> int:
    """Talk to a server in the terminal."""
    from pacellm.cli.chat import talk

    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    return talk(options.url, key, options.session, options.model, options.file, options.temperature)


def convert(options: argparse.Namespace) -> int:
    """Write an ordinary checkpoint of a GGUF file."""
    from pacellm.gguf.check import check_gguf

    header = check_gguf(options.file)
    if header is None:
        raise ConfigError(f"{options.file} is no GGUF file; give the file itself", param="file")

    import torch

    from pacellm.gguf import read as gguf

    gguf.convert(header, options.output, getattr(torch, options.dtype))
    print(f"{options.output}: serve it with `pacellm serve {options.output}`")
    return 0


def fetch(options: argparse.Namespace) -> int:
    """Put real models into the user's cache."""
    from pacellm import real_models

    for name in options.names or real_models.MODELS:
        directory = real_models.fetch(name, lambda line: print(line, file=sys.stderr, flush=True))
        print(f"{name}: {directory}")
    return 0


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of the server")
    add("--api-key", help="default: the variable OPENAI_API_KEY")
    add("--model", help="the name to ask for (default: what is served)")
    add("--session", help="name of a conversation to begin or go on with (default: a new one)")
    add("--file", type=Path, help="a document to put in front of the first question")
    add("--temperature", type=float, default=0.2, help="of the answers (default: 0.2; small models ramble at 1)")
    parser.set_defaults(run=chat)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="another model that chats, as smollm2: ten questions about 4,000 tokens, or --tokens"
    )
    parser.add_argument("--tokens", type=values.document_size, help="length of the document (default: 200,000)")
    parser.add_argument("--seed", type=int, help="of the bundled model's document (default: 0)")
    parser.add_argument("serve_arguments", nargs="*", help="flags for the server, after --")
    parser.set_defaults(run=demo)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the GGUF file, or a directory that holds only one")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the directory to make")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.set_defaults(run=convert)


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="smollm2 or gemma3-270m (default: both)")
    parser.set_defaults(run=fetch)


if __name__ == "__main__":
    sys.exit(main())
