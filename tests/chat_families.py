"""Small tokenizers that are built as the well-known families' are, each with a template in its family's form."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pacellm.text.tokenizer import ChatTokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog. What is the weather in Oslo? system user assistant model tool\n\n"
    'def f(x):\n    return {"name": "f", "arguments": {"a": [1, 2.5]}} <table> <b>bold</b> end_of_turn im_end eot INST'
)
LLAMA3 = """\
{{- bos_token }}
{%- if tools is defined and tools %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{{- '<|eot_id|>' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{- message.content | tojson }}{{- '<|eot_id|>' }}
{%- elif message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\nA call: <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=messages | length - 1, open=true) %}
{%- for message in messages[::-1] %}
{%- if ns.open and message.role == 'user' and not message.content.startswith('<tool_response>') %}
{%- set ns.open = false %}{%- set ns.last = messages | length - 1 - loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content %}{%- set reasoning = message.reasoning_content or '' %}
{%- if '</think>' in content and not reasoning %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and reasoning %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
MISTRAL = """\
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set talk = messages[1:] %}
{%- else %}{%- set talk = messages %}{%- endif %}
{{- bos_token }}
{%- for message in talk %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{%- if message.role == 'user' %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}
{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"""
PHI3 = """\
{%- for message in messages %}{%- if message.role == 'user' %}{{- '<|user|>\\n' + message.content + '<|end|>\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|assistant|>\\n' + message.content + '<|end|>\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""  # the first: without a system
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
CHATML = """\
{%- for message in messages %}
{%- if loop.first and messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

FAMILIES = ("llama3", "qwen3", "mistral", "phi3", "gemma", "chatml")


def build(name: str, path: Path) -> ChatTokenizer:
    """One family's tokenizer."""
    backend, options = _BUILDERS[name]()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "model_max_length": 4096, **options})
    )
    return ChatTokenizer(path)


def special(*texts: str, **flags: bool) -> list[AddedToken]:
    """Special tokens."""
    return [AddedToken(text, special=True, normalized=False, **flags) for text in texts]


def _byte_level(ignore_merges: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    words = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    return backend


def _sentencepiece(first: list[str], normalizer) -> Tokenizer:
    """As converted from sentencepiece: no pre-tokenizer, byte fallback; ``first`` are the vocabulary's first ids."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizer
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learned.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=300))
    model = json.loads(learned.to_str())["model"]
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            [tuple(merge) for merge in model["merges"]],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _llama3():
    backend = _byte_level(ignore_merges=True)
    backend.add_special_tokens(
        special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                "<|python_tag|>", *(f"<|reserved_special_token_{number}|>" for number in range(20)))
    )  # fmt: skip
    return backend, {"chat_template": LLAMA3, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def _qwen3():
    backend = _byte_level()
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    marks = (
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
        "<tool_response>",
        "</tool_response>",
        "<think>",
        "</think>",
    )
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in marks])
    return backend, {"chat_template": QWEN3, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _mistral():
    marks = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"]
    backend = _sentencepiece(marks, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))
    backend.add_special_tokens(special(*marks))
    return backend, {"chat_template": MISTRAL, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _phi3():
    backend = _sentencepiece(["<unk>", "<s>", "</s>"], normalizers.Replace(" ", "▁"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(special("<unk>", "<s>"))
    backend.add_tokens([AddedToken("</s>", special=False, normalized=False, rstrip=True)])
    backend.add_special_tokens(special("<|endoftext|>"))
    backend.add_special_tokens(special("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True))
    return backend, {"chat_template": PHI3, "bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}


def _gemma():
    marks, texts = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], ["<table>", "<b>", "</b>"]
    texts += ["\n" * number for number in range(2, 6)]
    backend = _sentencepiece([*marks, *texts], normalizers.Replace(" ", "▁"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_special_tokens(special(*marks))
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    return backend, {"chat_template": GEMMA, "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def _chatml():
    backend = _byte_level()
    backend.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return backend, {"chat_template": CHATML, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


_BUILDERS = {
    "llama3": _llama3, "qwen3": _qwen3, "mistral": _mistral, "phi3": _phi3, "gemma": _gemma, "chatml": _chatml,
}  # fmt: skip
