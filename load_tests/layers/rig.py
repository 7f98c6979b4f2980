"""A checkpoint in transformers whose FFNs can be given banks; layers below the first one are run once."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from pacellm.config import PAConfig
from pacellm.memory.bank import Bank
from pacellm.model.neurons import decoder_layers, ffns


class Remembering(nn.Module):
    """A down-projection that reads a bank and, while a document is read, writes it; without one it is the original."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original: Any = original
        self.bank: Bank | None = None
        self.writes = False

    def forward(self, inner: Tensor) -> Tensor:
        """[1, T, F] -> [1, T, H]"""
        plain = self.original(inner)
        if self.bank is None:
            return plain
        bias = getattr(self.original, "bias", None)
        x, y = inner[0], plain[0] if bias is None else plain[0] - bias
        config = self.bank.config
        if self.writes:
            starts = range(0, len(x), config.segment)
            output = torch.cat([self.bank.step(x[p : p + config.segment], y[p : p + config.segment]) for p in starts])
        else:
            output = self.bank.recall(x, y)
        return (output if bias is None else output + bias)[None]


class Given(nn.Module):
    """Stands in a layer's place and returns hidden states that are known already."""

    def __init__(self, layer: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """[1, T, H], whatever comes in."""
        return self.hidden


@dataclass
class Pass:
    """What a plain pass left: ``inputs`` [1, T, H] of each layer, ``hidden`` [R, H] states at its rows."""

    inputs: dict[int, Tensor]
    hidden: Tensor


class Rig:
    """A checkpoint in float32 whose FFNs can be given banks."""

    def __init__(self, path: str) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        self.model = model.eval().requires_grad_(False)
        self.sizes, self.downs = {}, {}
        for ffn in ffns(model):
            if ffn is not None:
                self.sizes[ffn.layer] = {"inner_size": ffn.inner, "hidden_size": ffn.hidden}
                self.downs[ffn.layer] = Remembering(ffn.down)
                setattr(ffn.module, ffn.layout.down, self.downs[ffn.layer])
        self._layers = decoder_layers(model)
        self._own = list(self._layers)
        self._inputs: dict[int, Tensor] | None = None
        for number, layer in enumerate(self._own):
            layer.register_forward_pre_hook(self._keep(number), with_kwargs=True)
        parameters = inspect.signature(model.base_model.forward).parameters
        self._cache = "cache" if "cache" in parameters else "past_key_values"

    def cache(self) -> DynamicCache:
        """An empty one."""
        return DynamicCache(config=self.model.config)

    def banks(self, layers: tuple[int, ...], config: PAConfig) -> dict[int, Bank]:
        """Empty banks."""
        return {layer: Bank(config, **self.sizes[layer]) for layer in layers}

    def plain(self, ids: list[int], cache: DynamicCache, rows: list[int]) -> Pass:
        """All layers without banks, continuing a cache."""
        self._inputs = {}
        hidden = self._forward(ids, cache, rows)
        inputs, self._inputs = self._inputs, None
        return Pass(inputs, hidden)

    def banked(
        self,
        ids: list[int],
        cache: DynamicCache,
        rows: list[int],
        banks: dict[int, Bank],
        plain: Pass,
        *,
        writes: bool = False,
    ) -> Tensor:
        """States [R, H] with banks, from the first patched layer on; below it ``plain`` of the same ids is taken."""
        with self._in_place(banks, writes), self._given(range(min(banks)), plain.inputs[min(banks)]):
            return self._forward(ids, cache, rows)

    def learn(self, ids: list[int], banks: dict[int, Bank], plain: Pass) -> None:
        """Write the banks as in :meth:`banked`, and leave out the layers above them too."""
        above = range(max(banks) + 1, len(self._own))
        with self._given(above, plain.inputs[0]):
            self.banked(ids, self.cache(), [len(ids) - 1], banks, plain, writes=True)

    @contextlib.contextmanager
    def _in_place(self, banks: dict[int, Bank], writes: bool) -> Iterator[None]:
        for layer, bank in banks.items():
            self.downs[layer].bank, self.downs[layer].writes = bank, writes
        try:
            yield
        finally:
            for layer in banks:
                self.downs[layer].bank = None

    @contextlib.contextmanager
    def _given(self, layers: Iterable[int], hidden: Tensor) -> Iterator[None]:
        for number in layers:
            self._layers[number] = Given(self._own[number], hidden)
        try:
            yield
        finally:
            for number in layers:
                self._layers[number] = self._own[number]

    def logprobs(self, hidden: Tensor) -> Tensor:
        """[R, V] of hidden states [R, H]; one call for many rows, since the head's weights are large."""
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return (logits if cap is None else torch.tanh(logits / cap) * cap).log_softmax(-1)

    def _forward(self, ids: list[int], cache: DynamicCache, rows: list[int]) -> Tensor:
        found = self.model.base_model(input_ids=torch.tensor([ids]), **{self._cache: cache}, use_cache=True)
        return found.last_hidden_state[0, rows]

    def _keep(self, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._inputs is not None:
                self._inputs[number] = args[0] if args else kwargs["hidden_states"]

        return hook


def branch(cache: DynamicCache, below: DynamicCache | None = None, start: int = 0) -> DynamicCache:
    """A cache that goes on by itself; its layers below ``start`` are those of ``below``."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    if below is not None:
        found.layers[:start] = [copy.copy(layer) for layer in below.layers[:start]]
    return found
