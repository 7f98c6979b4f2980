"""The processes that one model's layers are split over, one device each. Rank 0 leads, the others follow.

The layers are split by transformers (its ``tp_plan``), over gloo on CPUs and NCCL on GPUs. What the leader tells the
others goes over a gloo group of its own.
"""

from __future__ import annotations

import importlib.util
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from pacellm.errors import ModelError
from pacellm.model.neurons import FFN

_FOREVER = timedelta(days=365)  # a server may be idle; a rank that dies closes its connections


class Ranks:
    """One process's end of the group.

    Args:
        rank, size: this process's number, and how many there are.
        address: of the meeting place, as tcp://127.0.0.1:port.
        device: this rank's own.
    """

    def __init__(self, rank: int, size: int, address: str, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=address, rank=rank, world_size=size, timeout=_FOREVER
        )
        self._control = dist.new_group(backend="gloo", timeout=_FOREVER)

    def loading(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What ``from_pretrained`` is to be told.

        Raises:
            ModelError: this model cannot be split in so many parts.
        """
        from transformers.distributed.configuration_utils import DistributedConfig

        if importlib.util.find_spec("accelerate") is None:
            raise ModelError("tensor parallel loading needs accelerate: pip install 'pacellm[tensor-parallel]'")
        text = config.get_text_config()
        if not getattr(text, "base_model_tp_plan", None):
            raise ModelError(f"{config.model_type} has no tensor-parallel plan in transformers; serve it on one device")
        heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads)
        for name, number in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
            if number % self.size:
                raise ModelError(
                    f"tensor_parallel_size {self.size} does not divide this model's {name}, {number}; use a divisor"
                )
        return {"distributed_config": DistributedConfig(tp_size=self.size)}

    def own_width(self, ffn: FFN) -> int:
        """Inner activations that this rank computes of an FFN."""
        up = getattr(ffn.module, ffn.layout.up)
        rows = torch.zeros(1, 1, ffn.hidden, dtype=next(up.parameters()).dtype, device=self.device)
        with torch.inference_mode():
            return int(up(rows).shape[-1]) // (2 if ffn.layout.fused else 1)

    def total(self, part: Tensor) -> Tensor:
        """The sum over all ranks."""
        part = part.contiguous()
        dist.all_reduce(part)
        return part

    def send(self, message: object) -> None:
        """The leader's message to every other rank."""
        dist.broadcast_object_list([message], src=0, group=self._control)

    def receive(self) -> Any:
        """The leader's next message."""
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def leave(self) -> None:
        """End this process's part."""
        if dist.is_initialized():
            dist.destroy_process_group()
