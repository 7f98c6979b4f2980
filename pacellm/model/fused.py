"""On CUDA, what a decoder layer does between its matrix products in a few kernels instead of thirty.

transformers' modules spell norms, rotary positions and gated activations out as chains of small operations. Behind
decoded tokens these cost as much as a third of reading the weights. Here each is one kernel (``fused_triton.py``), and
projections of the same input are one product. Every replacement is tried out on random numbers beside what it stands
for and left out where it is not the same up to rounding, so an architecture that computes something else keeps its own.
Weights stay where their names say: projections become views of the matrix that holds them together.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacellm.experts.gated import activation_name
from pacellm.kernels import has_triton
from pacellm.model.neurons import FFN, decoder_layers, ffns

logger = logging.getLogger("pacellm.model")
_TOLERANCE = 0.02  # of the largest output, in bfloat16
_ROWS = 5  # of a try-out
_SCALES = (0.01, 3.0, 100.0)  # of its numbers: an epsilon shows among small ones, a limit among large ones
_EPSILONS = ("variance_epsilon", "eps")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_ROTARY = "apply_rotary_pos_emb"
_OWN = "_pacellm_fused"  # marks what was replaced


@torch.inference_mode()
def fuse(model: nn.Module, *, joins: bool = True) -> Counter[str]:
    """Replace what can be replaced.

    Args:
        joins: projections of one input too; a product of more columns may have other bits.

    Returns:
        How many of each kind.
    """
    unfuse(model)
    if not has_triton(next(model.parameters()).device):
        return Counter()
    found: Counter[str] = Counter()
    found["norms"] = sum(_replace(module, _norm(module)) for module in model.modules())
    for module in _in_layers(model):
        found["projections"] += joins and _join(module)
        found["rotary"] += _replace(module, _rotary(module, model))
    if joins:
        found["ffns"] = sum(_replace(ffn.module, _gated(ffn)) for ffn in ffns(model) if ffn is not None)
    if kept := +found:
        logger.info("fused: %s", ", ".join(f"{count} {name}" for name, count in kept.items()))
    return found


def unfuse(model: nn.Module) -> None:
    """The modules' own computations again; projections that were joined stay views of one matrix."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), _OWN, False):
            del module.forward


def _in_layers(model: nn.Module) -> Iterator[nn.Module]:
    for layer in decoder_layers(model):
        yield from layer.modules()


def _replace(module: nn.Module, forward: Callable[..., Any] | None) -> bool:
    if forward is None:
        return False
    module.forward = forward
    return True


def _is_free(module: nn.Module) -> bool:
    """Nobody has given it another forward."""
    return "forward" not in module.__dict__


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Up to rounding, and nothing that is not a number."""
    return all(
        mine.shape == one.shape
        and bool((mine.float() - one.float()).abs().max() <= _TOLERANCE * one.float().abs().max().clamp(min=1e-3))
        for mine, one in zip(found, expected, strict=True)
    )


def _random(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=like.device).to(like.dtype)


# -- norms -------------------------------------------------------------------------------------------------------------


class _Norm:
    def __init__(self, weight: Tensor, epsilon: float, *, plus_one: bool) -> None:
        self._weight, self._epsilon, self._plus_one = weight, epsilon, plus_one
        setattr(self, _OWN, True)

    def __call__(self, hidden: Tensor) -> Tensor:
        from pacellm.model import fused_triton

        return fused_triton.rms_norm(hidden, self._weight, self._epsilon, plus_one=self._plus_one)


def _norm(module: nn.Module) -> _Norm | None:
    if not type(module).__name__.endswith("RMSNorm") or not _is_free(module):
        return None
    weight, epsilon = _norm_parameters(module)
    if weight is None or epsilon is None:
        return None
    hidden = [scale * _random(weight, 1, _ROWS, weight.shape[0]) for scale in _SCALES]
    norms = (_Norm(weight.data, epsilon, plus_one=plus_one) for plus_one in (False, True))
    return next((norm for norm in norms if _agree(list(map(norm, hidden)), list(map(module, hidden)))), None)


def _norm_parameters(module: nn.Module) -> tuple[Tensor | None, float | None]:
    """Its weight, where that is all that it has, and its epsilon."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    epsilon = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    is_alone = weight is not None and len(parameters) == 1 and weight.ndim == 1
    return weight if is_alone else None, None if epsilon is None else float(epsilon)


# -- projections of one input ------------------------------------------------------------------------------------------


class _Joined:
    """Linear layers of one input as one product: the first that is asked computes all."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._sizes = [layer.weight.shape[0] for layer in layers]
        self.weight = _together([layer.weight for layer in layers])
        self._bias = None if layers[0].bias is None else _together([layer.bias for layer in layers])
        self._hidden: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def of(self, number: int, hidden: Tensor) -> Tensor:
        """What the layer of that number gives."""
        if self._hidden is not hidden:
            self._hidden, self._parts = hidden, F.linear(hidden, self.weight, self._bias).split(self._sizes, -1)
        part = self._parts[number]
        if number + 1 == len(self._sizes):  # nobody asks any more
            self._hidden, self._parts = None, ()
        return part


def _together(parameters: Sequence[Tensor]) -> Tensor:
    """Parameters of [n, ...] as one tensor, of which they are views from here on."""
    first, count = parameters[0].data, sum(len(one) for one in parameters)
    ends = [first.data_ptr(), *(one.data_ptr() + one.nbytes for one in parameters)]
    if all(one.data_ptr() == end and _lies_with(one, first) for one, end in zip(parameters, ends, strict=False)):
        return first.as_strided((count, *first.shape[1:]), first.stride(), first.storage_offset())  # since before
    whole = torch.cat([one.data for one in parameters])
    for one, part in zip(parameters, whole.split([len(one) for one in parameters]), strict=True):
        one.data = part
    return whole


def _lies_with(one: Tensor, other: Tensor) -> bool:
    return one.is_contiguous() and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class _Part:
    def __init__(self, joined: _Joined, number: int) -> None:
        self._joined, self._number = joined, number
        setattr(self, _OWN, True)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._joined.of(self._number, hidden)


def _join(module: nn.Module) -> bool:
    """Join a module's query, key and value projections, where it has such."""
    layers = [getattr(module, name, None) for name in _PROJECTIONS]
    if not all(map(_is_plain, layers)):
        return False
    linears: list[Any] = layers
    if len({(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in linears}) > 1:
        return False
    joined = _Joined(linears)
    for number, layer in enumerate(linears):
        layer.forward = _Part(joined, number)
    return True


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


# -- rotary positions --------------------------------------------------------------------------------------------------


def _rotary(module: nn.Module, model: nn.Module) -> Callable[..., Any] | None:
    """An attention module's forward with another ``apply_rotary_pos_emb`` among its globals; nothing else changes."""
    forward: Any = inspect.unwrap(type(module).forward)  # from behind what only renames arguments
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if not _is_free(module) or _ROTARY not in names or _ROTARY not in forward.__globals__:
        return None
    original, config, like = forward.__globals__[_ROTARY], cast(Any, model.config), next(module.parameters())
    size = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key = _random(like, 1, _ROWS, 4, size).transpose(1, 2), _random(like, 1, _ROWS, 2, size).transpose(1, 2)
    cos, sin = _random(like, 2, 1, _ROWS, size)  # no angle's, and no two alike: what is used where shows
    turned = _turned(original)
    try:
        agrees = _agree(turned(query, key, cos, sin), original(query, key, cos, sin))
    except (TypeError, RuntimeError, ValueError, IndexError):
        return None
    if not agrees:
        return None
    function = types.FunctionType(
        forward.__code__, {**forward.__globals__, _ROTARY: turned}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    function.__kwdefaults__ = forward.__kwdefaults__
    setattr(function, _OWN, True)
    return types.MethodType(function, module)


def _turned(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    from pacellm.model import fused_triton

    def turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        is_usual = not more and not named and query.ndim == 4 and query.shape[0] == 1 and cos.ndim == 3
        if not is_usual or cos.shape[-1] != query.shape[-1] or query.stride(-1) != 1 or key.stride(-1) != 1:
            return original(query, key, cos, sin, *more, **named)
        return fused_triton.rotary(query, key, cos, sin)

    return turned


# -- gated FFNs --------------------------------------------------------------------------------------------------------


class _Gated:
    def __init__(self, ffn: FFN, weight: Tensor, activation: str) -> None:
        self._module, self._down, self._weight, self._activation = ffn.module, ffn.layout.down, weight, activation
        setattr(self, _OWN, True)

    def __call__(self, hidden: Tensor) -> Tensor:
        from pacellm.model import fused_triton

        both = F.linear(hidden, self._weight)
        inner = fused_triton.gated(both.flatten(0, -2), self._activation)
        return getattr(self._module, self._down)(inner.view(*hidden.shape[:-1], -1))


def _gated(ffn: FFN) -> _Gated | None:
    layers = _gated_projections(ffn)
    if layers is None or (activation := activation_name(ffn.activation())) is None:
        return None
    inputs = [scale * _random(layers[0].weight, 1, _ROWS, ffn.hidden) for scale in _SCALES]
    outputs = [ffn.module(hidden) for hidden in inputs]
    weight = layers[0].weight.data if len(layers) == 1 else _Joined(layers).weight
    gated = _Gated(ffn, weight, activation)
    are_plain = all(isinstance(output, Tensor) for output in outputs)
    return gated if are_plain and _agree([gated(hidden) for hidden in inputs], outputs) else None


def _gated_projections(ffn: FFN) -> list[nn.Linear] | None:
    """Gate and up, or what holds both, where they are plain linear layers that nobody listens to."""
    layout = ffn.layout
    if not _is_free(ffn.module) or not layout.is_gated or layout.norm is not None:
        return None
    layers = [getattr(ffn.module, name) for name in (layout.gate, layout.up) if name is not None]
    return layers if all(_is_plain(layer) and layer.bias is None for layer in layers) else None


def _is_plain(layer: Any) -> bool:
    return type(layer) is nn.Linear and _is_free(layer) and not _has_hooks(layer)
