"""The FFN that counts what its experts do in prompts, and uses a session's working set for decoded tokens.

It takes the place of the FFN's ``forward``, so that parameters keep their names and what stands around projections
(banks, quantised linears) stays where it is. Prompt tokens use all experts. Decoded tokens of a request whose density
is below 1 use its working set; each expert's weights are read in place, once for all sequences that chose it, and as
products of a fixed shape, summed in the experts' order: a row's bits do not depend on the other rows' sets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pacellm.errors import ConfigError
from pacellm.experts.layout import LayerLayout, Layout
from pacellm.experts.working_set import choose
from pacellm.memory import activity
from pacellm.model.context import Chunk, Experts, StepContext, current_step
from pacellm.model.ffn import PersistentDown
from pacellm.model.neurons import FFN, ffns, original
from pacellm.rows import pad_rows


def why_no_sets(model: nn.Module) -> str | None:
    """Why this model's FFNs cannot work on parts of their experts; None where they can."""
    for ffn in ffns(model):
        if ffn is None or ffn.is_shared:
            return "its layers have routed experts of their own"
        if not ffn.layout.is_gated or ffn.layout.norm is not None:
            return "its FFNs are not gated ones without a norm inside"
        names = ffn.layout.projections
        if not all(isinstance(original(getattr(ffn.module, name)), nn.Linear) for name in names):
            return "its projections are not plain linear layers"
    return None


def attach(model: nn.Module, layout: Layout) -> None:
    """Let the model's FFNs count and use experts; it computes the same until a step brings a working set."""
    for ffn in ffns(model):
        assert ffn is not None
        ffn.module.forward = ExpertForward(ffn, layout.layers[ffn.layer])


def detach(model: nn.Module) -> None:
    """The models' own FFNs again."""
    for ffn in ffns(model):
        if ffn is not None and isinstance(ffn.module.__dict__.get("forward"), ExpertForward):
            del ffn.module.forward


class ExpertForward:
    """A gated FFN's forward with experts.

    Args:
        ffn: of a decoder layer; its neurons are in the layout's order.
        layout: of that layer.
    """

    def __init__(self, ffn: FFN, layout: LayerLayout) -> None:
        self._ffn, self._plain = ffn, ffn.module.forward
        self._heat, self._num_experts = layout.heat, layout.num_experts
        self._activation: Callable[[Tensor], Tensor] = ffn.activation()
        self._blocks: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[1, T, H] or [T, H], as the FFN itself."""
        step = current_step()
        chunks = [chunk for chunk in step.chunks if chunk.experts is not None] if step is not None else []
        thin = [chunk for chunk in chunks if chunk.num_decoded and _experts(chunk).density < 1.0]
        reads = [chunk for chunk in chunks if chunk.stop - chunk.start > chunk.num_decoded]
        if step is None or not (thin or reads):
            return self._plain(hidden)
        flat, down = hidden.flatten(0, -2), self._ffn.down
        if len(thin) < len(step.chunks) or reads:
            inner = self._inner(flat)
            plain = original(down)(inner)
        else:
            inner = flat.new_zeros(len(flat), self._ffn.inner)
            plain = flat.new_zeros(len(flat), self._ffn.hidden)
        for chunk in reads:
            self._count(chunk, inner)
        if thin:
            self._use_sets(thin, flat, inner, plain, keeps_inner=isinstance(down, PersistentDown))
        return self._remember(step, inner, plain).view(hidden.shape)

    def _remember(self, step: StepContext, inner: Tensor, plain: Tensor) -> Tensor:
        down = self._ffn.down
        if isinstance(down, PersistentDown) and any(chunk.banks for chunk in step.chunks):
            return down.remember(step, inner, plain)
        return plain

    def _inner(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, F]."""
        layout, module = self._ffn.layout, self._ffn.module
        if layout.fused:
            gate, up = getattr(module, layout.up)(hidden).chunk(2, dim=-1)
        else:
            gate, up = getattr(module, str(layout.gate))(hidden), getattr(module, layout.up)(hidden)
        return self._activation(gate) * up

    def _count(self, chunk: Chunk, inner: Tensor) -> None:
        """Stage the prompt's tokens, and add them to the session's activity where their segment ends."""
        owned, layer = _experts(chunk), self._ffn.layer
        total, staged = owned.state.activity[layer], owned.stage.activity[layer]
        for piece in chunk.pieces[: len(chunk.pieces) - chunk.num_decoded]:
            staged += activity.count(inner[piece.start : piece.stop], self._num_experts)
            if piece.ends:
                total += staged
                staged.zero_()
                owned.sets.pop(layer, None)

    def _set_of(self, chunk: Chunk) -> Tensor:
        """[E] bool, kept until the activity changes."""
        owned, layer = _experts(chunk), self._ffn.layer
        if layer not in owned.sets:
            owned.sets[layer] = choose(owned.state.activity[layer], self._heat, owned.density)
        return owned.sets[layer]

    def _use_sets(
        self, chunks: list[Chunk], hidden: Tensor, inner: Tensor, plain: Tensor, *, keeps_inner: bool
    ) -> None:
        """Decoded rows of ``chunks`` by their working sets, into ``plain``, and where asked into ``inner``."""
        rows: list[int] = []
        sets: list[Tensor] = []
        for chunk in chunks:
            own = self._set_of(chunk)
            rows += range(chunk.stop - chunk.num_decoded, chunk.stop)
            sets += [own] * chunk.num_decoded
        place = torch.tensor(rows, device=hidden.device)
        chosen = torch.stack(sets)
        union = chosen.any(0).nonzero()[:, 0].tolist()
        mask = pad_rows(chosen[:, union].to(hidden.device, hidden.dtype)).T[:, :, None]
        x, y = self._products(pad_rows(hidden[place]), mask, union)
        plain[place] = y[: len(rows)]
        if keeps_inner:
            whole = torch.zeros(len(rows), self._num_experts, x.shape[2], dtype=x.dtype, device=x.device)
            whole[:, union] = x[:, : len(rows)].transpose(0, 1)
            inner[place] = whole.flatten(1)

    def _products(self, hidden: Tensor, mask: Tensor, union: list[int]) -> tuple[Tensor, Tensor]:
        """Inner activations [U, n, B] of the experts in ``union``, zero where ``mask`` is, and outputs [n, H]."""
        blocks, bias = self._weights(), self._biases(union)
        gate = hidden.new_empty(len(union), len(hidden), blocks[0][0].shape[1])
        up = torch.empty_like(gate)
        for place, expert in enumerate(union):
            torch.mm(hidden, blocks[expert][0], out=gate[place])
            torch.mm(hidden, blocks[expert][1], out=up[place])
        if bias is not None:
            gate, up = gate + bias[0], up + bias[1]
        x = self._activation(gate) * up * mask
        wide = torch.promote_types(hidden.dtype, torch.float32)
        y = torch.zeros(len(hidden), self._ffn.hidden, dtype=wide, device=hidden.device)
        for place, expert in enumerate(union):
            if wide == hidden.dtype:
                y.addmm_(x[place], blocks[expert][2])
            else:
                y += torch.mm(x[place], blocks[expert][2])
        if (down_bias := original(self._ffn.down).bias) is not None:
            y = y + down_bias
        return x, y.to(hidden.dtype)

    def _weights(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By expert views of gate [H, B], up [H, B] and down [B, H].

        On a CPU the down-projection is laid out once so that an expert's part of it lies side by side as well.
        """
        if self._blocks is None:
            weights: dict[str, Tensor] = {}
            for axis in self._ffn.axes():
                if axis.role == "down" and axis.parameter.device.type == "cpu":
                    axis.parameter.data = axis.parameter.data.T.contiguous().T
                if axis.view.ndim == 2:
                    weights[axis.role] = axis.view.T if axis.dim == 1 else axis.view  # [F, H]
            size = self._ffn.inner // self._num_experts
            gate, up, down = (weights[role].split(size) for role in ("gate", "up", "down"))
            self._blocks = [(g.T, u.T, d) for g, u, d in zip(gate, up, down, strict=True)]
        return self._blocks

    def _biases(self, union: list[int]) -> tuple[Tensor, Tensor] | None:
        """[U, 1, B] of gate and up, None where there are none."""
        found = {axis.role: axis.view for axis in self._ffn.axes() if axis.view.ndim == 1}
        if not found:
            return None
        size = self._ffn.inner // self._num_experts
        gate, up = (found[role].view(self._num_experts, 1, size)[union] for role in ("gate", "up"))
        return gate, up


def _experts(chunk: Chunk) -> Experts:
    assert chunk.experts is not None
    return chunk.experts


def check_density(density: float | None, model: nn.Module, layout: Layout | None, param: str) -> None:
    """Refuse working sets where there can be none.

    Raises:
        ConfigError: no layout, or FFNs that cannot work on parts.
    """
    if density is None or density == 1.0:
        return
    if layout is None:
        raise ConfigError(f"{param} below 1 needs a layout; serve with --ce-layout FILE", param=param)
    problem = why_no_sets(model)
    if next(model.parameters()).device.type != "cpu":
        problem = problem or "decoded tokens use parts of an FFN on a CPU only"
    if problem is not None:
        raise ConfigError(f"{param} below 1 does not work with this model: {problem}", param=param)
