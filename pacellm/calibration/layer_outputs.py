"""A text's layer outputs, kept from one reading and handed out in another where nothing before them has changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pacellm.rows import missing_rows


class LayerOutputs:
    """What a model's decoder layers gave for the tokens of one text.

    Args:
        layers: the model's, in order.

    Attributes:
        are_whole: a layer's output is its hidden states and nothing else; only then it can be handed out.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        self._kept: list[list[Tensor]] = [[] for _ in self._layers]
        self._wrapped = [False] * len(self._layers)  # in a tuple
        self.are_whole = True

    @contextmanager
    def recording(self, count: int) -> Iterator[None]:
        """Keep the first ``count`` rows of what each layer gives inside: the text's next tokens."""

        def keep(number: int, output: Any) -> None:
            hidden, *rest = output if isinstance(output, tuple) else (output,)
            self._wrapped[number] = isinstance(output, tuple)
            is_whole = isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[0] == 1
            if not is_whole or any(one is not None for one in rest):
                self.are_whole = False
            if self.are_whole:
                self._kept[number].append(hidden[:, :count].clone())

        with ExitStack() as hooks:
            for number, layer in enumerate(self._layers):
                handle = layer.register_forward_hook(lambda _, __, output, number=number: keep(number, output))
                hooks.callback(handle.remove)
            yield
        if not self.are_whole:
            self._kept = [[] for _ in self._layers]

    @contextmanager
    def replaying(self, numbers: Iterable[int], start: int, stop: int) -> Iterator[None]:
        """Inside, the layers ``numbers`` are not computed but give what they gave for tokens start to stop."""
        replaced = [self._layers[number] for number in numbers]
        for number, layer in zip(numbers, replaced, strict=True):
            layer.forward = self._stand_in(number, start, stop)
        try:
            yield
        finally:
            for layer in replaced:
                del layer.forward

    def _stand_in(self, number: int, start: int, stop: int) -> Any:
        if len(self._kept[number]) > 1:
            self._kept[number] = [torch.cat(self._kept[number], dim=1)]
        hidden = self._kept[number][0][:, start:stop]
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, missing_rows(stop - start)))
        output = (hidden,) if self._wrapped[number] else hidden
        return lambda *_, **__: output
