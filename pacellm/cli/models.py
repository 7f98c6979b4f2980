"""``pacellm demo``, ``fetch`` and ``convert``: the bundled model and others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pacellm.cli import values
from pacellm.errors import ConfigError


def add_demo(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm demo``."""
    parser.add_argument(
        "--model", help="another model that chats, as smollm2: ten questions about 4,000 tokens, or --tokens"
    )
    parser.add_argument("--tokens", type=values.document_size, help="length of the document (default: 200,000)")
    parser.add_argument("--seed", type=int, help="of the bundled model's document (default: 0)")
    parser.add_argument("serve_arguments", nargs="*", help="flags for the server, after --")
    parser.set_defaults(run=demo)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm convert``."""
    parser.add_argument("file", help="the GGUF file, or a directory that holds only one")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the directory to make")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.set_defaults(run=convert)


def add_fetch(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm fetch``."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="smollm2 or gemma3-270m (default: both)")
    parser.set_defaults(run=fetch)


def demo(options: argparse.Namespace) -> int:
    """Start a server on the bundled model, or on a real one, and ask it about a document."""
    if options.model is not None:
        from pacellm.demo.real import show_real
        from pacellm.real_models import resolve

        if options.seed is not None:
            raise ConfigError("--seed is for the bundled model's documents", param="model")
        return show_real(options.model, resolve(options.model), options.tokens, options.serve_arguments)
    from pacellm.demo.show import show

    tokens = 200_000 if options.tokens is None else options.tokens
    return show(tokens, options.seed or 0, options.serve_arguments)


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
