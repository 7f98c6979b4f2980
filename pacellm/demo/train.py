"""Train the bundled model on two CPU cores: ``python -m pacellm.demo.train --out DIR``.

Three sliding-window layers with RoPE (window 4) give every position a bag of its last ten tokens; two
full-attention layers without positions match and copy. The recipe and what failed are in weights/MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from pacellm.demo.attention import MasklessAttention
from pacellm.demo.batches import Batch, make_batch
from pacellm.demo.tokenizer_build import MAX_LENGTH, build_tokenizer

SLIDING_LAYERS, FULL_LAYERS, WINDOW = 3, 2, 4

Stages = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class TrainConfig:
    """What a run depends on."""

    steps: int = 2400
    tokens_per_step: int = 4096
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    #: full layers are trained with their queries times a factor drawn from (this, 1), and so bear dilution
    hottest: float = 0.6
    hot_from: float = 0.4
    #: (share of the steps after which it ends, sequence length)
    lengths: Stages = ((0.16, 128), (0.32, 256), (0.48, 512), (0.68, 1024), (0.88, 2048), (1.0, 4096))
    #: (share of the steps after which it ends, share of dictionary rows)
    dictionaries: Stages = ((0.08, 1.0), (0.3, 0.5), (1.0, 0.15))
    max_questions: int = 16
    #: number of the first batch: phases see different data
    first_batch: int = 0


#: "learn" starts from nothing and finds matching and copying; "refine" makes both exact among many similar facts
PHASES = {
    "learn": TrainConfig(),
    "refine": TrainConfig(
        steps=3000,
        tokens_per_step=8192,
        learning_rate=1.2e-3,
        hot_from=0.0,
        lengths=((0.25, 1024), (0.6, 2048), (0.95, 4096), (1.0, 8192)),
        dictionaries=((1.0, 0.05),),
        max_questions=48,
        first_batch=1_000_000,
    ),
}


def model_config(tokenizer: PreTrainedTokenizerBase) -> SmolLM3Config:
    """The architecture: RoPE below, NoPE above."""
    return SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=SLIDING_LAYERS + FULL_LAYERS,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_LENGTH,
        sliding_window=WINDOW,
        use_sliding_window=True,
        layer_types=["sliding_attention"] * SLIDING_LAYERS + ["full_attention"] * FULL_LAYERS,
        no_rope_layers=[1] * SLIDING_LAYERS + [0] * FULL_LAYERS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def schedule(fraction: float, stages: Stages) -> float:
    """The value of the first stage that ends after ``fraction``."""
    return next(value for end, value in stages if fraction < end or end == stages[-1][0])


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to a fiftieth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, float, float]:
    """The weighted loss, and accuracy and loss over the tokens of weight 1."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets, weights = batch.tokens[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    kept = weights > 0
    logits, targets, weights = logits[kept], targets[kept], weights[kept]
    each = F.cross_entropy(logits, targets, reduction="none")
    answers = weights == 1
    answer_loss = each[answers].mean()
    loss = answer_loss + (each * weights)[~answers].sum() / max(1, int((~answers).sum()))
    correct = (logits.argmax(-1) == targets)[answers].float().mean()
    return loss, correct.item(), answer_loss.item()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def train(config: TrainConfig, out: Path, start: Path | None, resume: bool, save_every: int = 100) -> None:
    """Train, logging every 20 steps to ``log.jsonl`` and saving ``checkpoint.pt`` in ``out``.

    The weights begin as those of the checkpoint ``start``, or at random; with ``resume`` a run in ``out`` goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(out)
    attention = MasklessAttention()
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(model_config(tokenizer))
    model.set_attn_implementation(attention.name)
    if start is not None:
        model.load_state_dict(torch.load(start, weights_only=True)["model"])
    optimizer = make_optimizer(model, config)
    first, checkpoint = 0, out / "checkpoint.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.monotonic()
    for step in range(first, config.steps):
        fraction = step / config.steps
        length, share = int(schedule(fraction, config.lengths)), schedule(fraction, config.dictionaries)
        batch = make_batch(
            config.first_batch + step, length, config.tokens_per_step, share, config.max_questions, tokenizer
        )
        hot = random.Random(f"hot {step}").uniform(config.hottest, 1.0)
        attention.sharpness = hot if fraction >= config.hot_from else 1.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss, accuracy, answer_loss = losses(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            entry = {
                "step": step, "length": length, "dictionaries": share, "loss": round(loss.item(), 4),
                "accuracy": round(accuracy, 4), "answer_loss": round(answer_loss, 4),
                "seconds": round(time.monotonic() - started, 1),
            }  # fmt: skip
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
        if (step + 1) % save_every == 0 or step + 1 == config.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "config": asdict(config)}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)


def _tokenizer(out: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``out``, built there on the first call."""
    if not (out / "tokenizer.json").exists():
        build_tokenizer().save_pretrained(out)
    return AutoTokenizer.from_pretrained(out)


def export(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, weights: Path, sharpness: float) -> None:
    """Write a plain ``transformers`` directory; ``sharpness`` is folded into the full layers' query projections."""
    model = SmolLM3ForCausalLM(model_config(tokenizer))
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    with torch.no_grad():
        for layer in model.model.layers[SLIDING_LAYERS:]:
            layer.self_attn.q_proj.weight.mul_(sharpness)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(weights)
    tokenizer.save_pretrained(weights)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the log, the checkpoint and the export")
    parser.add_argument("--phase", choices=PHASES, default="learn")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="begin with the weights of this checkpoint")
    parser.add_argument("--steps", type=int, help="default: the phase's own number")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--sharpness", type=float, default=1.5, help="factor on the full layers' queries at export")
    parser.add_argument("--export-only", type=Path, metavar="DIR", help="only export --out's checkpoint to DIR")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.export_only is None:
        config = PHASES[args.phase]
        if args.steps is not None:
            config = replace(config, steps=args.steps)
        train(config, args.out, args.start, args.resume)
    export(args.out / "checkpoint.pt", _tokenizer(args.out), args.export_only or args.out / "weights", args.sharpness)


if __name__ == "__main__":
    main()
