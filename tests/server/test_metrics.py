"""What /metrics tells of banks and lengths, against what the API tells of the same session."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pacellm.memory.reads import OUTCOMES, rates

TEXT = "The access code of the amber archive is 48213. " * 40


def samples(live, name, **labels):
    """{labels without the model: value} of a metric's samples that have these labels."""
    found = {}
    for family in text_string_to_metric_families(live.http.get("/metrics").text):
        for one in family.samples:
            if one.name == name and labels.items() <= one.labels.items():
                found[tuple(value for label, value in sorted(one.labels.items()) if label != "model_name")] = one.value
    return found


def ask(live, text, session):
    body = {"model": "pacellm-demo", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    answer = live.http.post("/v1/chat/completions", json=body | {"session_id": session, "ignore_eos": True})
    assert answer.status_code == 200
    return answer.json()


def reads(live, layer):
    found = {}
    for counter, outcome in OUTCOMES.items():
        found[counter] = sum(samples(live, "pacellm_bank_reads_total", layer=layer, outcome=outcome).values())
    return found


def test_one_hit_rate(clean):
    """A session's rates by the API are those of the counters that dashboards draw, whose parts add up to 1."""
    before = {layer: reads(clean, layer) for layer in ("1", "4")}
    answers = [ask(clean, TEXT, "s"), ask(clean, TEXT + "What is the code?", "s")]
    layers = clean.http.get("/v1/sessions/s").json()["bank"]["layers"]
    for layer, told in layers.items():
        counted = {name: count - before[layer][name] for name, count in reads(clean, layer).items()}
        assert counted == {name: told[name] for name in OUTCOMES}
        assert counted == {name: sum(a["pacellm"]["bank"]["layers"][layer][name] for a in answers) for name in OUTCOMES}
        assert {name: told[name] for name in rates(counted)} == rates(counted)
        assert told["hit_rate"] == counted["hits"] / sum(counted.values())
        assert counted["empty"] > 0


def test_rates_of_nothing():
    assert rates({}) == {"hit_rate": None, "fuse_rate": None, "miss_rate": None, "empty_rate": None}
    assert rates({"hits": 3, "empty": 1, "merges": 9})["hit_rate"] == 0.75


@pytest.mark.parametrize("name", ["bank_effective_rank", "bank_slot_age", "bank_slots_filled"])
def test_banks_are_told_as_histograms(clean, name):
    before = samples(clean, f"pacellm_{name}_count")
    bank = [ask(clean, text, "s") for text in ("Hi", TEXT)][-1]["pacellm"]["bank"]
    after = samples(clean, f"pacellm_{name}_count")
    assert {layer: count - before.get(layer, 0) for layer, count in after.items()} == {("1",): 2, ("4",): 2}
    if name == "bank_slots_filled":
        assert bank["layers"]["1"]["filled"] <= samples(clean, f"pacellm_{name}_sum")["1",]


def test_lengths_and_short_times(clean):
    names = ("request_prompt_tokens_sum", "request_generation_tokens_sum", "request_prompt_tokens_count")
    before = [samples(clean, f"pacellm_{name}")[()] for name in names]
    usage = ask(clean, "Hi", "s")["usage"]
    after = [samples(clean, f"pacellm_{name}")[()] for name in names]
    grown = [now - then for then, now in zip(before, after, strict=True)]
    assert grown == [usage["prompt_tokens"], usage["completion_tokens"], 1]
    queue = samples(clean, "pacellm_request_queue_time_seconds_bucket")
    assert min(float(end) for (end,) in queue) == 0.001
