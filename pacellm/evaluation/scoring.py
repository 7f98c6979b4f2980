"""Metrics as LongBench, ∞-Bench and RULER publish them, from 0 to 1.

Sources: LongBench's metrics.py (github.com/THUDM/LongBench, arXiv 2308.14508), ∞-Bench's compute_scores.py
(github.com/OpenBMB/InfiniteBench, arXiv 2402.13718), RULER's eval/synthetic/constants.py (github.com/NVIDIA/RULER,
arXiv 2404.06654). They are kept to as they are, oddities included: figures must compare with published ones.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

from pacellm.errors import ConfigError

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"
    "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_BREAKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))


def parts_found(text: str, wanted: Sequence[str]) -> float:
    """Share of ``wanted`` that stands in the text, in any case (RULER's ``string_match_all``)."""
    return sum(one.lower() in text.lower() for one in wanted) / len(wanted)


def any_found(text: str, wanted: Sequence[str]) -> float:
    """1 where one of ``wanted`` stands in the text, in any case (RULER's ``string_match_part``)."""
    return float(any(one.lower() in text.lower() for one in wanted))


def first_number(text: str, wanted: str) -> float:
    """1 where the text's first digits are ``wanted`` (∞-Bench: pass keys, number strings)."""
    found = re.search(r"[0-9]+", text)
    return float(found is not None and found.group() == wanted)


def word_found(text: str, wanted: str) -> float:
    """1 where ``wanted`` is one of the text's words, punctuation taken for spaces (∞-Bench: values of keys)."""
    return float(wanted in text.translate(_BREAKS).split())


def qa_f1(text: str, truth: str) -> float:
    """F1 of words, without case, punctuation and articles (LongBench)."""
    return _f1(_plain(text).split(), _plain(truth).split())


def qa_f1_chinese(text: str, truth: str) -> float:
    """The same of jieba's words.

    Raises:
        ConfigError: jieba is not there.
    """
    found, wanted = (
        [word for piece in _chinese_words(one) if (word := _plain_chinese(piece))] for one in (text, truth)
    )
    return _f1(found, wanted)


def rouge_l(text: str, truth: str) -> float:
    """F of ROUGE-L over sentences, as the package ``rouge`` 1.0.1 counts it: of distinct words, sentences end at
    every full stop, and what is without any counts 0."""
    found, wanted = _sentences(text), _sentences(truth)
    if not found or not wanted:
        return 0.0
    union: set[str] = set()
    for reference in wanted:
        for sentence in found:
            union |= set(_common_subsequence(reference.split(" "), sentence.split(" ")))
    recall = len(union) / len(_distinct(wanted))
    precision = len(union) / len(_distinct(found))
    return 2.0 * precision * recall / (precision + recall + 1e-8)


def rouge_l_chinese(text: str, truth: str) -> float:
    """The same of jieba's words.

    Raises:
        ConfigError: jieba is not there.
    """
    return rouge_l(" ".join(_chinese_words(text)), " ".join(_chinese_words(truth)))


def classification(text: str, truth: str, classes: Sequence[str]) -> float:
    """1 for the right class alone, shared among the classes that the text names (LongBench)."""
    named = [name for name in classes if name in text]
    for name in named:  # as published: what is taken out while it is walked over makes the walk pass one by
        if name in truth and name != truth:
            named.remove(name)
    return 1.0 / len(named) if truth in named else 0.0


def number_share(text: str, wanted: str) -> float:
    """Share of the text's numbers that are ``wanted`` (LongBench: counts and numbers of paragraphs)."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def paragraph(text: str, truth: str) -> float:
    """:func:`number_share` of the number in ``Paragraph N`` or ``段落N`` (LongBench)."""
    named = re.search(r"(?:Paragraph |段落)(\d+)", truth)
    if named is None:
        raise ConfigError(f"an answer of passage retrieval must be like 'Paragraph 1', not {truth!r}", param="data")
    return number_share(text, named.group(1))


def code_similarity(text: str, truth: str) -> float:
    """Likeness of the first line that is neither fence nor comment, in whole hundredths, as ``fuzzywuzzy`` counts it
    without python-Levenshtein (LongBench)."""
    lines = text.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    if line == truth:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, truth).ratio()) / 100


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split())


def _plain_chinese(text: str) -> str:
    return "".join(text.lower().translate(_NO_CHINESE_PUNCTUATION).split())


def check_chinese() -> None:
    """Refuse before anything is asked.

    Raises:
        ConfigError: jieba is not there.
    """
    _jieba()


def _chinese_words(text: str) -> list[str]:
    return list(_jieba().cut(text, cut_all=False))


def _jieba():
    try:
        import jieba
    except ImportError:
        raise ConfigError("LongBench's Chinese tasks need jieba: pip install 'pacellm[eval]', or leave them out "
                          "with --tasks", param="tasks") from None  # fmt: skip
    jieba.setLogLevel("WARNING")
    return jieba


def _sentences(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(".") if part]


def _distinct(sentences: Sequence[str]) -> set[str]:
    return {word for sentence in sentences for word in sentence.split(" ")}


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that ``rouge`` walks back to."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, against in enumerate(other):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if word == against else max(lengths[i][j + 1], lengths[i + 1][j])
    i, j, found = len(one), len(other), []
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            found.append(one[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
