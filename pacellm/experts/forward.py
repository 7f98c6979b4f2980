"""The FFN that counts what its experts do in prompts, and uses a session's working set for decoded tokens.

It takes the place of the FFN's ``forward``, so that parameters keep their names and what stands around projections
(banks, quantised linears) stays where it is. Prompt tokens use all experts. Decoded tokens of a request whose density
is below 1 use its working set: activations of the other experts' neurons are zero. On a CPU that is the whole FFN with
zeros in it, whose bits do not depend on the other rows' sets: reading less was not faster (docs/lab.md). On CUDA it is
a Triton kernel (``kernel.py``) which finds sets in a table by row, so a decode step waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pacellm.errors import ConfigError
from pacellm.experts.gated import Weights, activation_name
from pacellm.experts.layout import LayerLayout, Layout
from pacellm.kernels import has_triton
from pacellm.memory import expert_counts as activity
from pacellm.model.context import Chunk, Experts, StepContext, current_step
from pacellm.model.ffn import PersistentDown
from pacellm.model.neurons import FFN, ffns, original
from pacellm.transfer import to_device

_TOLERANCE = 0.03  # of the kernel on CUDA, as a part of the largest output
_tried: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


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


def why_no_kernel(model: nn.Module, layout: Layout) -> str | None:
    """Why the model's device cannot work on parts of its FFNs; None where it can. CUDA's kernel is tried out once."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"decoded tokens use parts of an FFN on a CPU or with CUDA, not on {device.type}"
    if model not in _tried:
        _tried[model] = _try_out(model, layout)
    return _tried[model]


def _try_out(model: nn.Module, layout: Layout) -> str | None:
    """The first FFN of each size beside torch's form, on random rows."""
    if not has_triton(next(model.parameters()).device):
        return "Triton is not installed"
    kinds: dict[tuple[int, int, str], ExpertForward] = {}
    for ffn in ffns(model):
        assert ffn is not None
        if (name := activation_name(ffn.activation())) is None:
            return "on CUDA its activation must be SiLU or GELU"
        kinds.setdefault((ffn.inner, ffn.hidden, name), ExpertForward(ffn, layout.layers[ffn.layer]))
    try:
        errors = [forward.kernel_error(name) for (_, _, name), forward in kinds.items()]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return next((f"the kernel is off by {found:.2g}" for found in errors if not found <= _TOLERANCE), None)


def attach(model: nn.Module, layout: Layout) -> None:
    """Let the model's FFNs count and use experts; it computes the same until a step brings a working set."""
    on_device = next(model.parameters()).device.type == "cuda" and why_no_kernel(model, layout) is None
    for ffn in ffns(model):
        assert ffn is not None
        kernel = activation_name(ffn.activation()) if on_device else None
        ffn.module.forward = ExpertForward(ffn, layout.layers[ffn.layer], kernel)


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
        kernel: the activation that Triton's form is to use; None: torch's form does the work.
    """

    def __init__(self, ffn: FFN, layout: LayerLayout, kernel: str | None = None) -> None:
        self._ffn, self._plain, self.kernel = ffn, ffn.module.forward, kernel
        self._num_experts = layout.num_experts
        self._activation: Callable[[Tensor], Tensor] = ffn.activation()
        self._read: Weights | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[1, T, H] or [T, H], as the FFN itself."""
        step = current_step()
        if step is None:
            return self._plain(hidden)
        flat = hidden.flatten(0, -2)
        if step.decode is not None and step.decode.tokens.sets is not None:
            return self._static(step, step.decode.tokens.sets, flat).view(hidden.shape)
        reading = [chunk for chunk in step.chunks if chunk.counts_experts]
        thin = [chunk for chunk in step.chunks if chunk.set_row is not None]
        if not (thin or reading):
            return self._plain(hidden)
        return self._mixed(step, flat, reading, thin).view(hidden.shape)

    def _mixed(self, step: StepContext, hidden: Tensor, reading: list[Chunk], thin: list[Chunk]) -> Tensor:
        """A step of prompts and decoded tokens, [T, H]: prompts of ``reading`` are counted, decoded tokens of ``thin``
        use sets."""
        is_thin = len(thin) == len(step.chunks) and not reading
        inner = None if is_thin and self.kernel is not None else self._inner(hidden)
        for chunk in reading:
            assert inner is not None
            self._count(chunk, inner)
        self._choose_sets(thin)
        if thin and self.kernel is not None:
            return self._remember(step, *self._by_kernel(step, thin, hidden, inner))
        assert inner is not None
        if thin:
            inner = self._masked(step, thin, inner)
        return self._remember(step, inner, original(self._ffn.down)(inner))

    def _static(self, step: StepContext, rows: Tensor, hidden: Tensor) -> Tensor:
        """A step of one token for each sequence, whose sets are known: [B, H], by rows [B] of the table of sets.

        Rows of all experts are a set like others where that saves reading the weights twice; where a row's bits must
        not depend on its mates they are what they are without any.
        """
        assert step.sets is not None
        table, down = step.sets.layers[self._ffn.layer], self._ffn.down
        if self.kernel is None:
            inner = self._zeroed(self._inner(hidden), table[rows])
            plain = original(down)(inner)
        else:
            inner, plain = self._launch(hidden, table, rows)
            if step.deterministic:
                whole, is_whole = self._inner(hidden), (rows == step.sets.everything)[:, None]
                inner = torch.where(is_whole, whole, inner)
                plain = torch.where(is_whole, original(down)(whole), plain)
        return self._remember(step, inner, plain)

    def _remember(self, step: StepContext, inner: Tensor, plain: Tensor) -> Tensor:
        """As the down-projection, which is gone around: what looks at its input is shown it."""
        down = self._ffn.down
        for look in down._forward_pre_hooks.values():
            look(down, (inner,))
        return down.remember(step, inner, plain) if isinstance(down, PersistentDown) else plain

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
        for piece in chunk.prompt_pieces:
            staged += activity.count(inner[piece.start : piece.stop], self._num_experts)
            if piece.ends:
                total += staged
                staged.zero_()
                owned.sets.pop(layer, None)

    def _choose_sets(self, chunks: list[Chunk]) -> None:
        layer = self._ffn.layer
        for chunk in chunks:
            owned = _experts(chunk)
            if layer not in owned.sets:  # from here until the activity changes
                owned.sets[layer] = owned.table.write(owned.row, owned.state.activity, owned.density, layer)

    def _masked(self, step: StepContext, chunks: list[Chunk], inner: Tensor) -> Tensor:
        """Inner activations [T, F] with zeros in the decoded rows of ``chunks``."""
        assert step.sets is not None
        place, rows = _rows_of(step, chunks, inner.device)
        chosen = step.sets.layers[self._ffn.layer][rows]
        return inner.index_copy(0, place, self._zeroed(inner[place], chosen))

    def _zeroed(self, inner: Tensor, chosen: Tensor) -> Tensor:
        """Inner activations [n, F], zero outside of the sets [n, E]."""
        experts = inner.view(len(inner), self._num_experts, -1)
        return experts.masked_fill(~chosen[:, :, None], 0.0).flatten(1)

    def _by_kernel(
        self, step: StepContext, chunks: list[Chunk], hidden: Tensor, inner: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Inner activations [T, F] and outputs [T, H], the decoded rows of ``chunks`` by the kernel."""
        assert step.sets is not None
        if inner is None:
            inner = hidden.new_zeros(len(hidden), self._ffn.inner)
            plain = hidden.new_zeros(len(hidden), self._ffn.hidden)
        else:
            plain = original(self._ffn.down)(inner)
        place, rows = _rows_of(step, chunks, hidden.device)
        x, y = self._launch(hidden[place], step.sets.layers[self._ffn.layer], rows)
        return inner.index_copy_(0, place, x), plain.index_copy_(0, place, y)

    def _launch(self, hidden: Tensor, table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inner activations [n, F], zero outside of sets, which are ``rows`` of ``table``, and outputs [n, H]."""
        from pacellm.experts import kernel as experts_triton  # Triton is not everywhere

        assert self.kernel is not None
        return experts_triton.products(hidden, self._parameters(), table, rows, self.kernel)

    @torch.inference_mode()
    def kernel_error(self, activation: str) -> float:
        """Triton's form beside torch's on random rows: the largest difference over the largest output."""
        from pacellm.experts import kernel as experts_triton

        weights, experts = self._parameters(), self._num_experts
        device, dtype = weights.gate.device, weights.gate.dtype
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(5, self._ffn.hidden, generator=generator, device=device).to(dtype)
        table = torch.rand(5, experts, generator=generator, device=device) < 0.5
        table[3], table[4] = False, True
        rows = torch.tensor([4, 1, 0, 3, 2], device=device)
        found = experts_triton.products(hidden, weights, table, rows, activation)
        inner = self._zeroed(self._inner(hidden), table[rows])
        pairs = zip(found, (inner, original(self._ffn.down)(inner)), strict=True)
        errors = torch.stack([(mine - one).abs().max() / one.abs().max() for mine, one in pairs])
        return float(errors.max())  # which keeps what is not a number, as Python's max would not

    def _parameters(self) -> Weights:
        """Views of what the kernel reads."""
        if self._read is None:
            found = {(axis.role, axis.view.ndim): axis.view for axis in self._ffn.axes()}
            matrices = (found["gate", 2], found["up", 2], found["down", 2])
            biases = (found.get(("gate", 1)), found.get(("up", 1)), original(self._ffn.down).bias)
            self._read = Weights(*matrices, *biases)
        return self._read


def _experts(chunk: Chunk) -> Experts:
    assert chunk.experts is not None
    return chunk.experts


def _rows_of(step: StepContext, chunks: list[Chunk], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which rows of the step use sets, and which rows of the table those are; the same in all layers."""
    if "set rows" not in step.scratch:
        places = [row for chunk in chunks for row in range(chunk.stop - chunk.num_decoded, chunk.stop)]
        owners = [_experts(chunk).row for chunk in chunks for _ in range(chunk.num_decoded)]
        step.scratch["set rows"] = tuple(to_device(torch.tensor([places, owners]), device))
    return step.scratch["set rows"]  # type: ignore[return-value]


def check_density(density: float | None, model: nn.Module, layout: Layout | None, param: str) -> None:
    """Refuse working sets where there can be none.

    Raises:
        ConfigError: no layout, or FFNs or a device that cannot work on parts.
    """
    if density is None or density == 1.0:
        return
    if layout is None:
        raise ConfigError(f"{param} below 1 needs a layout; serve with --ce-layout FILE", param=param)
    problem = why_no_sets(model) or why_no_kernel(model, layout)
    if problem is not None:
        raise ConfigError(f"{param} below 1 does not work with this model: {problem}", param=param)
