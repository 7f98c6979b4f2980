"""Values are what the published scorers gave: LongBench's metrics.py with rouge 1.0.1 and fuzzywuzzy 0.18."""

import sys
import types

import pytest

from pacellm.errors import ConfigError
from pacellm.evaluation import scoring
from pacellm.evaluation.suites.longbench import score

CLASSES = ["Human", "Human group", "Location", "Number of something"]


@pytest.mark.parametrize(
    ("metric", "text", "truth", "value"),
    [
        (scoring.qa_f1, "The Battle of Hastings, in 1066.", "battle of hastings", 0.75),
        (scoring.qa_f1, "a an the", "the", 0.0),
        (scoring.qa_f1, "1066 1066", "1066", 2 / 3),
        (scoring.rouge_l, "the cat sat on the mat", "the cat lay on the mat. it was big", 0.6153846106508877),
        (scoring.rouge_l, "a b c. d e f a", "a c e. f g", 0.7272727223140496),
        (scoring.rouge_l, "one two three two one", "one two one three. two", 0.999999995),
        (scoring.rouge_l, "a.b", "b . a c", 0.7999999952000001),
        (scoring.rouge_l, "The council met. It agreed.", "The council agreed on Monday. It met", 0.8333333284722222),
        (scoring.rouge_l, "", "x", 0.0),
        (scoring.rouge_l, "...", "x", 0.0),
        (scoring.number_share, "There are 7 or 8, so 7", "7", 2 / 3),
        (scoring.number_share, "none", "7", 0.0),
        (scoring.paragraph, "Paragraph 12, 3", "Paragraph 12", 0.5),
        (scoring.paragraph, "段落5", "段落5", 1.0),
        (scoring.code_similarity, "```python\n# c\nreturn x + 1\n", "return x + 2", 0.92),
        (scoring.code_similarity, "\n\nfoo(bar)\nbaz", "foo(bar)", 1.0),
        (scoring.code_similarity, "", "x", 0.0),
        (scoring.code_similarity, "`", "", 1.0),
        (scoring.first_number, "It is 71432, not 5.", "71432", 1.0),
        (scoring.first_number, "5 or 71432", "71432", 0.0),
        (scoring.first_number, "none", "71432", 0.0),
        (scoring.word_found, 'The value is: "ab-12".', "ab-12", 1.0),
        (scoring.word_found, "ab-123", "ab-12", 0.0),
    ],
)
def test_values(metric, text, truth, value):
    assert metric(text, truth) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "truth", "value"),
    [
        ("Human group", "Human group", 1.0),
        ("Human group", "Human", 0.5),
        ("Location or Human", "Human", 0.5),
        ("x", "Human", 0.0),
    ],
)
def test_classes(text, truth, value):
    assert scoring.classification(text, truth, CLASSES) == value


def test_rulers_matches():
    assert scoring.parts_found("Alpha, then beta", ["ALPHA", "gamma"]) == 0.5
    assert scoring.any_found("Alpha, then beta", ["gamma", "BETA"]) == 1.0
    assert scoring.any_found("Alpha", ["gamma"]) == 0.0


def test_chinese(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ConfigError, match="need jieba"):
        scoring.check_chinese()
    by_character = types.SimpleNamespace(cut=lambda text, cut_all: list(text), setLogLevel=lambda level: None)
    monkeypatch.setitem(sys.modules, "jieba", by_character)
    assert scoring.qa_f1_chinese("北京，上海。A", "上海 a") == pytest.approx(0.75)
    assert scoring.rouge_l_chinese("北京上海", "上海市") == pytest.approx(0.5714285665306124)


def test_longbench_takes_first_lines_and_the_best_answer():
    assert score("triviaqa", "\nParis\nLondon", ["London", "Paris"], ()) == 1.0
    assert score("qasper", "Paris\nLondon", ["London"], ()) == pytest.approx(2 / 3)
    assert score("trec", "Location\nHuman", ["Location"], CLASSES) == 1.0
    assert score("qasper", "Paris", [], ()) == 0.0
