"""GGUF files: every family that is served from them gives the logits of the model that it was written from, and what
cannot be served rightly is refused and named."""

import importlib.util
import itertools
import json
import random
import struct
import subprocess
import sys
import time

import gguf
import pytest
import torch

from pacellm.errors import ConfigError, ModelError
from pacellm.gguf import header as gguf_header
from pacellm.gguf.check import ARCHITECTURES, check_gguf
from pacellm.gguf.header import find, read_header
from pacellm.gguf.read import convert, read_config, read_model, read_tokenizer
from pacellm.model.load import load
from pacellm.text.tokenizer import ChatTokenizer
from tests.gguf.gguf_files import TOKENS, tiny, write

IDS = torch.randint(5, len(TOKENS), (1, 40), generator=torch.Generator().manual_seed(1))


def logits(module):
    with torch.inference_mode():
        return module(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "model.gguf", tiny("llama"), "llama")
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_is_the_one_that_was_written(name, tmp_path):
    model, file = tiny(name), tmp_path / "model.gguf"
    write(file, model, name)
    header = check_gguf(file)
    read = read_model(header, read_config(header), dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)
    assert load(file).context_length == 512


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5000.0},
    ],
)
def test_a_lengthened_context(rope, tmp_path):
    model, file = tiny("llama", rope_parameters=rope), tmp_path / "model.gguf"
    write(file, model, "llama")
    header = check_gguf(file)
    read = read_model(header, read_config(header), dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)


def llama3_divisors(factor, theta=5000.0, size=16):
    """As llama.cpp's converter computes rope_freqs.weight."""
    low, high, native = 8192 / 1.0, 8192 / 4.0, 8192
    divisors = []
    for frequency in 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size):
        length = 2 * torch.pi / frequency
        if length < high:
            divisors.append(1.0)
        elif length > low:
            divisors.append(factor)
        else:
            smooth = (native / length - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors)


def test_llama_3_scaling_is_read_from_its_divisors(tmp_path):
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0, **bands}
    model, file = tiny("llama", rope_parameters=rope), tmp_path / "model.gguf"
    write(file, model, "llama", tensors=[("rope_freqs.weight", llama3_divisors(8.0, 500000.0))])
    found = read_config(check_gguf(file)).rope_parameters
    assert found == pytest.approx(rope)
    write(file, model, "llama", tensors=[("rope_freqs.weight", llama3_divisors(8.0, 400000.0))])
    with pytest.raises(ModelError, match="rope_freqs"):
        read_config(check_gguf(file))


def test_tokens_types_and_template(file):
    tokenizer = ChatTokenizer(file)
    prompt = tokenizer.render([{"role": "user", "content": "he 12"}])
    assert prompt == "<|user|>he 12<|end|>"
    assert [TOKENS[i] for i in tokenizer.encode(prompt)] == ["<|user|>", "he", "Ġ", "1", "2", "<|end|>"]
    assert load(file).eos_token_ids == {2, TOKENS.index("<|end|>")}


def test_digits_apart(tmp_path):
    write(tmp_path / "model.gguf", tiny("llama"), "llama", pre="smollm")
    backend = read_tokenizer(check_gguf(tmp_path / "model.gguf")).backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a  12")] == ["a", "ĠĠ", "1", "2"]


WORDS = ("the", "he", "th", "ther", "then", "in", "ing", "thing", "hin", "▁t", "▁th", "▁the", "▁▁", "nn", "ne", "en")
PIECES = {
    **dict.fromkeys(("<unk>", "<s>", "</s>", "<|user|>", "<|end|>"), 0.0),
    **{f"<0x{byte:02X}>": 0.0 for byte in range(256)},
    **{word: -float(rank) for rank, word in enumerate(WORDS)},
    **{letter: -100.0 - rank for rank, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz")},
}


def merged(text):
    """Sentencepiece's BPE as llama.cpp has it: the neighbours that make the best piece, the first of equals."""
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(PIECES[a + b], -at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in PIECES]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [p for part in parts for p in ([part] if part in PIECES else [f"<0x{b:02X}>" for b in part.encode()])]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentencepiece_vocabularies(has_prefix, tmp_path):
    model, file = tiny("llama", vocab_size=len(PIECES)), tmp_path / "model.gguf"
    write(file, model, "llama", pieces=PIECES, metadata=[("tokenizer.ggml.add_space_prefix", has_prefix)])
    tokenizer, draw = ChatTokenizer(file), random.Random(0)
    texts = ["the thing in then", "  the", "é then 7"]
    texts += ["".join(draw.choice("thein gr ") for _ in range(30)) for _ in range(50)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert [list(PIECES)[i] for i in ids] == ["<s>", *merged(" " * has_prefix + text)], text
        assert tokenizer.decode(ids[1:]) == text
    prompt = [list(PIECES)[i] for i in tokenizer.encode("<|user|>the<|end|>")]
    assert prompt == ["<|user|>", "▁the" if has_prefix else "the", "<|end|>"]


def test_what_lies_beside_the_file_is_not_read(file):
    (file.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    (file.parent / "chat_template.jinja").write_text("{{ messages }} of another model")
    (file.parent / "tokenizer_config.json").write_text("{")
    assert load(file).eos_token_ids == {2, TOKENS.index("<|end|>")}
    assert ChatTokenizer(file).render([{"role": "user", "content": "a"}]) == "<|user|>a<|end|>"


def test_a_converted_file_is_the_same_model(file, tmp_path):
    target = tmp_path / "made"
    convert(check_gguf(file), target)
    mine, theirs = load(target), load(file)
    assert {name: tensor.tolist() for name, tensor in mine.module.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in theirs.module.state_dict().items()
    }
    assert mine.eos_token_ids == theirs.eos_token_ids
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert ChatTokenizer(target).backend.to_str() == ChatTokenizer(file).backend.to_str()
    assert ChatTokenizer(target).render([{"role": "user", "content": "a"}]) == "<|user|>a<|end|>"
    with pytest.raises(ModelError, match="is there already"):
        convert(check_gguf(file), target)


def test_a_conversion_that_fails_leaves_nothing(file, tmp_path, monkeypatch):
    monkeypatch.setattr("pacellm.gguf.read.read_tokenizer", lambda header: 1 / 0)
    place = tmp_path / "place"
    with pytest.raises(ZeroDivisionError):
        convert(check_gguf(file), place / "made")
    assert not any(place.iterdir())


def test_half_types_stay(tmp_path):
    model, file = tiny("llama").half(), tmp_path / "model.gguf"
    write(file, model, "llama")
    assert load(file).dtype == torch.float16
    assert load(file, dtype="float32").dtype == torch.float32


def test_which_file_a_path_means(file, tmp_path):
    assert find(tmp_path) == file
    assert find(tmp_path / "other") is None
    (tmp_path / "renamed").write_bytes(file.read_bytes())
    assert find(tmp_path / "renamed") == tmp_path / "renamed"
    (tmp_path / "second.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"several GGUF files.*model.gguf, second.gguf"):
        find(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find(tmp_path) is None


def test_every_cut_is_noticed(file):
    whole = file.read_bytes()
    start = read_header(file).data
    for length in (*range(0, start, 97), start, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut short|damaged|cannot be read"):
            read_header(file)


def test_damage_in_the_header_is_noticed_or_harmless(file):
    """Whatever a byte is changed to: an error of ours, soon, or a header."""
    whole = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    started, messages = time.monotonic(), []
    for _ in range(300):
        damaged = bytearray(whole)
        at = int(torch.randint(0, read_header_length(whole), (), generator=generator))
        damaged[at] = int(torch.randint(0, 256, (), generator=generator))
        file.write_bytes(damaged)
        try:
            check_gguf(file)
        except ModelError as error:
            messages.append(str(error))
    assert messages
    assert all(str(file) in message for message in messages)
    assert time.monotonic() - started < 60


def read_header_length(content):
    return content.index(b"token_embd.weight") + 200


def test_lists_that_claim_to_be_endless(file):
    content = file.read_bytes()
    at = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    file.write_bytes(content[:at] + struct.pack("<Q", 2**60) + content[at + 8 :])
    with pytest.raises(ModelError, match="damaged"):
        read_header(file)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mamba", "keep a state"),
        ("falcon", "bias by distance"),
        ("clip", "not served from GGUF files: these are"),
        ("qwen35", "keep a state"),
    ],
)
def test_other_architectures(name, says, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", name)
    writer.add_context_length(10)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=says):
        check_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ([("expert_count", 8)], "routed experts"),
        ([("rope.scaling.type", "longrope")], "longrope"),
        ([("attention.scale", 2.0)], r"sets llama.attention.scale to 2.0, which is not known"),
    ],
)
def test_keys_that_would_change_the_model(metadata, says, tmp_path):
    write(tmp_path / "model.gguf", tiny("llama"), "llama", metadata=metadata)
    with pytest.raises(ModelError, match=says):
        check_gguf(tmp_path / "model.gguf")


def test_tensors_that_no_part_takes(tmp_path):
    write(tmp_path / "model.gguf", tiny("llama"), "llama", tensors=[("blk.0.attn_q.bias", torch.ones(64))])
    with pytest.raises(ModelError, match="parts that are not known"):
        load(tmp_path / "model.gguf")


def test_a_way_to_cut_text_that_is_not_known(tmp_path):
    write(tmp_path / "model.gguf", tiny("llama"), "llama", pre="other")
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.pre 'other'"):
        check_gguf(tmp_path / "model.gguf")


def test_without_a_template(tmp_path):
    write(tmp_path / "model.gguf", tiny("llama"), "llama", template=None)
    assert not ChatTokenizer(tmp_path / "model.gguf").has_chat_template


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_the_extra_is_named_where_a_package_is_missing(package, file, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ConfigError, match=rf"{package}: pip install 'pacellm\[gguf\]'"):
        check_gguf(file)


def test_a_wrong_file_is_refused_before_torch_is_loaded(file):
    file.write_bytes(file.read_bytes()[:-100])
    code = (
        "import sys; from pacellm.cli.main import main; status = main(['serve', sys.argv[1]]); "
        "print(status, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2 []", done.stderr
    assert "cut short" in done.stderr


def test_sizes_of_types_are_ggmls():
    for kind, size in gguf_header.TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == size
