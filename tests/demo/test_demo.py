"""The bundled model loads with plain transformers and answers about documents."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm.demo import MODEL_PATH
from pacellm.demo.evaluate import examine, load_answerer, summarise
from pacellm.demo.generator import make_document


def test_it_loads_plainly_and_is_small():
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    assert model.config.max_position_embeddings == 262_144
    assert (MODEL_PATH / "model.safetensors").stat().st_size < 20e6


def test_a_document_has_the_length_asked_for_and_is_reproducible():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    document = make_document(2000, 8, 3, tokenizer)
    assert document == make_document(2000, 8, 3, tokenizer)
    assert 1950 < len(tokenizer.encode(document.text)) <= 2000
    assert all(fact.answer in document.text for fact in document.facts)


def test_it_recalls_facts_of_short_documents():
    answerer = load_answerer(MODEL_PATH, None, 1.0)
    outcomes = [o for seed in range(4) for o in examine(answerer, 1024, 12, 6, seed, turns=False)]
    assert summarise(outcomes)["recall"] >= 0.95
