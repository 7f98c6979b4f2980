"""Work whose result the step does not need, on a CUDA stream of its own beside the step's: observing banks.

A candidate: what it saves was not measured on a GPU; it stays until it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pacellm.model.context import StepContext

_KEY = "side stream"


@contextmanager
def on_side_stream(step: StepContext, *read: Tensor) -> Iterator[None]:
    """What is done inside runs beside the rest of the step, where the step has a stream for that.

    Args:
        read: the step's tensors that it reads, kept until :func:`join_side_stream`: nothing else may take their place.
    """
    stream = step.side_stream
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    step.scratch.setdefault(_KEY, []).append(read)  # type: ignore[attr-defined]
    with torch.cuda.stream(stream):
        yield


def join_side_stream(step: StepContext) -> None:
    """What comes after waits for all that ran beside the step."""
    if step.side_stream is not None and step.scratch.pop(_KEY, None):
        torch.cuda.current_stream(step.side_stream.device).wait_stream(step.side_stream)
