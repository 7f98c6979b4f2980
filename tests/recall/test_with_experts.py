"""Activity codes where Cortical Experts go around the down-projection that codes are taken at."""

import torch

from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.demo.reader import ask, read
from pacellm.llm import LLM
from pacellm.model.load import load
from tests.experts.test_layout import random_layout

SIZES = {"working_memory": 2560, "working_memory_window": 512, "working_memory_index": ("activity",)}


def codes(llm):
    (session,) = [one for one in llm.engine.sessions if one.key[1] == "s"]
    return torch.cat([block.parts[-1] for block in session.history.blocks], 1)


def test_codes_are_those_without_a_layout_and_questions_are_answered(tmp_path):
    path = tmp_path / "layout.safetensors"
    random_layout(load(MODEL_PATH).module, experts=8).save(path)
    with LLM(**SIZES) as plain, LLM(layout=path, **SIZES) as llm:
        document = make_document(9000, 12, 77, llm.tokenizer)
        read(plain, document, "s")
        read(llm, document, "s")
        differing = codes(plain) ^ codes(llm)
        assert sum(bin(one).count("1") for one in differing.flatten().tolist()) < 1e-3 * 8 * differing.numel()
        assert codes(llm).unique().numel() > 200
        for fact in document.facts[1:11:3]:
            assert str(ask(llm, document, fact.question, "s")) == str(ask(plain, document, fact.question, "s"))
        assert not llm.engine.faults.counts
