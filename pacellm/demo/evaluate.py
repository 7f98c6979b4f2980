"""Measure recall by length and depth: ``python -m pacellm.demo.evaluate --lengths 1024 8192 --documents 20``.

Every document is read once and every question is asked right behind it, or, with ``--turns``, behind the turns
before. An answer counts only if it is exactly the stated value. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, SmolLM3ForCausalLM

from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import NOT_STATED, Document, Fact, make_document
from pacellm.demo.plain import PlainAnswerer

DEPTHS = 5


@dataclass(frozen=True)
class Outcome:
    """One question asked of a document of ``length`` tokens; ``depth`` is None where nothing is stated."""

    length: int
    depth: float | None
    expected: str
    answer: str

    @property
    def depth_bin(self) -> int:
        """Which of ``DEPTHS`` equal parts of the document states it."""
        return int(min(self.depth or 0.0, 0.999) * DEPTHS)

    @property
    def right(self) -> bool:
        """Whether the answer is exactly the expected one."""
        return self.answer == self.expected


def prompt_ids(answerer: PlainAnswerer, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant begins."""
    text = answerer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return answerer.tokenizer(text, add_special_tokens=False)["input_ids"]


def opening(document: Document, question: str) -> list[dict[str, str]]:
    """A conversation's first message."""
    return [{"role": "user", "content": f"{document.text}\n\n{question}"}]


def ask_apart(answerer: PlainAnswerer, document: Document, questions: list[str]) -> list[str]:
    """Answers to questions that are each the first one about the document."""
    prompts = [prompt_ids(answerer, opening(document, question)) for question in questions]
    shared = min(len(prompt) for prompt in prompts) - 1
    while any(prompt[:shared] != prompts[0][:shared] for prompt in prompts):
        shared -= 1
    answerer.reset()
    answerer.read(prompts[0][:shared])
    return [answerer.answer(prompt[shared:]) for prompt in prompts]


def ask_in_turns(answerer: PlainAnswerer, document: Document, questions: list[str]) -> list[str]:
    """Answers to questions asked one after another in one conversation."""
    answerer.reset()
    messages: list[dict[str, str]] = []
    answers: list[str] = []
    done = 0
    for question in questions:
        turn = {"role": "user", "content": question}
        messages = [*messages, turn] if messages else opening(document, question)
        prompt = prompt_ids(answerer, messages)
        answerer.read(prompt[done:-1])
        answers.append(answerer.answer(prompt[-1:]))
        done = len(prompt) - 1
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def examine(
    answerer: PlainAnswerer, length: int, num_facts: int, num_questions: int, seed: int, turns: bool
) -> list[Outcome]:
    """Ask about one document: ``num_questions`` spread over its depth, and half as many without an answer."""
    document = make_document(length, num_facts, seed, answerer.tokenizer, num_unknown=max(1, num_questions // 2))
    stated = [document.facts[int((i + 0.5) * len(document.facts) / num_questions)] for i in range(num_questions)]
    unknown = [Fact(question, NOT_STATED, -1.0) for question in document.unknown_questions]
    asked = [fact for pair in zip(stated[::2], unknown, strict=False) for fact in pair] + stated[1::2]
    asked += [fact for fact in stated + unknown if fact not in asked]
    answers = (ask_in_turns if turns else ask_apart)(answerer, document, [fact.question for fact in asked])
    return [
        Outcome(length, None if fact.depth < 0 else fact.depth, fact.answer, answer)
        for fact, answer in zip(asked, answers, strict=True)
    ]


def share(outcomes: Iterable[Outcome]) -> float | None:
    """Share of right answers, None for no questions."""
    right = [outcome.right for outcome in outcomes]
    return round(sum(right) / len(right), 4) if right else None


def summarise(outcomes: list[Outcome]) -> dict[str, object]:
    """The numbers of one length."""
    stated = [o for o in outcomes if o.depth is not None]
    return {
        "length": outcomes[0].length,
        "questions": len(stated),
        "recall": share(stated),
        "recall_by_depth": [share(o for o in stated if o.depth_bin == index) for index in range(DEPTHS)],
        "false_not_stated": sum(o.answer == NOT_STATED for o in stated),
        "unknown_questions": len(outcomes) - len(stated),
        "not_stated": share(o for o in outcomes if o.depth is None),
    }


def load_answerer(path: Path, ablated: int | None, sharpness: float, chunk: int = 512) -> PlainAnswerer:
    """The model at ``path``, perhaps with one layer's FFN silenced or its full layers sharpened."""
    model = SmolLM3ForCausalLM.from_pretrained(path)
    with torch.no_grad():
        if ablated is not None:
            model.model.layers[ablated].mlp.down_proj.weight.zero_()
        for layer, kind in zip(model.model.layers, model.config.layer_types or [], strict=True):
            if kind == "full_attention":
                layer.self_attn.q_proj.weight.mul_(sharpness)
    return PlainAnswerer(model, AutoTokenizer.from_pretrained(path), chunk)


def table(rows: list[dict[str, object]]) -> str:
    """The summaries as a table for people."""
    lines = [f"{'tokens':>8} {'asked':>6} {'recall':>7} {'by depth':^34} {'false n/s':>9} {'not stated':>10}"]
    for row in rows:
        depths = row["recall_by_depth"]
        assert isinstance(depths, list)
        cells = " ".join("     -" if value is None else f"{value:6.3f}" for value in depths)
        lines.append(
            f"{row['length']:>8} {row['questions']:>6} {row['recall']:>7} {cells} {row['false_not_stated']:>9}"
            f" {row['not_stated']:>10}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--documents", type=int, default=20, help="documents per length")
    parser.add_argument("--questions", type=int, default=6, help="answerable questions per document")
    parser.add_argument("--facts", type=int, help="facts per document (default: one per 256 tokens, at least 12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", action="store_true", help="ask a document's questions in one conversation")
    parser.add_argument("--ablate-ffn", type=int, metavar="LAYER", help="silence this layer's FFN")
    parser.add_argument("--sharpness", type=float, default=1.0, help="further factor on the full layers' queries")
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    answerer = load_answerer(args.model, args.ablate_ffn, args.sharpness)
    rows = []
    for length in args.lengths:
        started = time.monotonic()
        num_facts = args.facts or max(12, length // 256)
        outcomes = [
            outcome
            for number in range(args.documents)
            for outcome in examine(
                answerer, length, num_facts, args.questions, 1_000_003 * args.seed + number, args.turns
            )
        ]
        for outcome in outcomes:
            if args.show_wrong and not outcome.right:
                print(f"{length}: depth {outcome.depth}, expected {outcome.expected!r}, got {outcome.answer!r}")
        rows.append({**summarise(outcomes), "seconds": round(time.monotonic() - started, 1)})
    print(table(rows))
    settings = {"seed": args.seed, "turns": args.turns, "ablate_ffn": args.ablate_ffn, "sharpness": args.sharpness}
    print(json.dumps({**settings, "lengths": rows}))


if __name__ == "__main__":
    main()
