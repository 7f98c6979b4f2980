"""On a CUDA device: the attention kernel, the engine beside transformers, and the bundled model. ``make test-gpu``."""

import copy

import pytest
import torch

from pacellm.demo import MODEL_PATH
from pacellm.demo.evaluate import opening
from pacellm.demo.generator import make_document
from pacellm.errors import ModelError
from pacellm.model.load import load, prepare
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import SamplingParams
from tests.engine.helpers import assert_nothing_held, new_engine, prompt, request, run, tokens
from tests.model.cuda_steps import check
from tests.models import FAMILIES, tiny

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("windows", [(None, 100), (100, None), (4, 700, None)])
def test_attention(dtype, windows):
    check(dtype, "cuda", windows, 2e-2, size=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_transformers(family):
    plain = tiny(family, dtype=torch.bfloat16).cuda()
    ids = prompt(700, 2)
    expected = plain(torch.tensor([ids], device="cuda")).logits[0, -1].float()
    engine = new_engine(prepare(copy.deepcopy(plain)), pa=False)
    engine.add(request("x", ids))
    found = engine.runner.run(engine.scheduler.schedule()).logits[0].float()
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.995


@pytest.mark.parametrize("mode", ["on", "off"])
def test_the_bundled_model_answers(mode):
    tokenizer = ChatTokenizer(MODEL_PATH)
    model = load(MODEL_PATH, device="cuda")
    assert model.dtype == torch.bfloat16
    engine = new_engine(model, max_num_batched_tokens=2048, kv_cache_memory=2**30)
    document = make_document(8000, 20, 5, tokenizer._tokenizer)
    sampling = SamplingParams(max_tokens=16, temperature=0)
    asked = [
        request(str(number), tokenizer.encode(tokenizer.render(opening(document, fact.question))), sampling, pa=mode)
        for number, fact in enumerate(document.facts[::4])
    ]
    events = run(engine, *asked)
    answers = [tokenizer.backend.decode(tokens(events[str(number)])) for number in range(len(asked))]
    right = [fact.answer in answer for fact, answer in zip(document.facts[::4], answers, strict=True)]
    assert sum(right) >= 4, answers
    assert_nothing_held(engine)


def test_float32_is_refused():
    with pytest.raises(ModelError, match="not float32"):
        load(MODEL_PATH, dtype=torch.float32, device="cuda")
