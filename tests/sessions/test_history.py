"""Requests that append to a session's history: the same bits as the whole history sent again, wherever it was."""

import dataclasses
import json

import pytest
from tokenizers import Tokenizer

from pacellm import errors
from pacellm.demo import MODEL_PATH
from pacellm.engine.engine import run_until_idle
from pacellm.model.load import prepare
from pacellm.sessions.ending import Ending
from pacellm.text.detokenizer import Vocabulary
from pacellm.text.stream import TextStream
from pacellm.types import Admitted, Append, Failed, Kinship, Outline, SamplingParams
from tests.engine.helpers import (
    GREEDY,
    assert_nothing_held,
    assert_same_banks,
    banks,
    crash,
    finish,
    new_engine,
    prompt,
    request,
    run,
    tokens,
)
from tests.models import tiny

KEY = ("tenant", "s")
FIRST, TAILS = prompt(400, 1), [prompt(70, 2), prompt(3, 3), prompt(130, 4)]
ENDS = ("text", "answer", "system", "user", "assistant", "tool")


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("smollm3"))


def append(name, ids, sampling=GREEDY, session="s", outline=None, **changes):
    """The same tail behind whatever end, another one alone."""
    made = Append(dict.fromkeys(ENDS, ids), ids)
    changes = {"append": made, "outline": outline or Outline(), **changes}
    return request(name, ids, sampling, session=session, **changes)


def resent(engine):
    """The conversation with its whole history in every prompt."""
    history, answers = list(FIRST), []
    for number, tail in enumerate([[], *TAILS]):
        history += tail
        found = tokens(run(engine, request(str(number), history, session="s"))[str(number)])
        answers.append(found)
        history += found
    return answers


@pytest.fixture(scope="module")
def wanted(model):
    engine = new_engine(model)
    return resent(engine), banks(engine, "s"), engine.sessions.get(KEY).context


def failed(engine, one):
    last = run(engine, one)[one.request_id][-1]
    assert isinstance(last, Failed), last
    return last.error


def interrupted(model, engine, name, number, between, settings):
    """What happens between two turns; the engine and the session's name afterwards."""
    match between:
        case "drop":
            engine.sessions.drop(engine.sessions.get(KEY))
        case "host":
            engine.eviction.evict_one()
        case "restart" | "kill":
            engine.close() if between == "restart" else crash(engine)
            return new_engine(model, **settings), name
        case "fork":
            engine.call(engine.ops.fork(("tenant", name), ("tenant", f"s{number}"), None))
        case "snapshot":
            future = engine.call(engine.snapshots.export(("tenant", name), kv=False, limit=10**8))
            run_until_idle(engine)
            checked = engine.snapshots.check(bytearray(future.result()), trust_unsigned=False)
            engine.call(engine.snapshots.put(("tenant", f"s{number}"), checked, None))
    run_until_idle(engine)
    return engine, f"s{number}" if between in ("fork", "snapshot") else name


@pytest.mark.parametrize("between", ["nothing", "drop", "host", "restart", "kill", "snapshot", "fork", "log"])
def test_as_if_all_were_sent_again(model, wanted, between, tmp_path):
    settings = {"session_host_memory": 10**7} if between == "host" else {}
    if between in ("restart", "kill", "log"):
        settings = {"session_dir": tmp_path, "session_sync": between == "kill"}
    if between == "log":
        settings |= {"session_log_memory": 10, "session_memory": 0}
    engine, name = new_engine(model, **settings), "s"
    answers = [tokens(run(engine, request("0", FIRST, session="s"))["0"])]
    for number, tail in enumerate(TAILS, 1):
        engine, name = interrupted(model, engine, name, number, between, settings)
        events = run(engine, append(str(number), tail, session=name))[str(number)]
        answers.append(tokens(events))
        end = finish(events)
        assert end.kinship.dropped_tokens == 0
        assert end.usage.prompt_tokens > end.kinship.history_tokens > 400
    assert answers == wanted[0]
    found = engine.sessions.get(("tenant", name))
    if between != "log":
        assert found.context == wanted[2]
        assert_same_banks(banks(engine, name), wanted[1])


def test_requests_that_wait_for_one_another(model, wanted):
    engine = new_engine(model, max_num_batched_tokens=100)
    appended = [append(str(number), tail) for number, tail in enumerate(TAILS, 1)]
    events = run(engine, request("0", FIRST, session="s"), *appended)
    assert [tokens(events[name]) for name in "0123"] == wanted[0]


def test_choices(model, wanted):
    sampling = SamplingParams(max_tokens=10, temperature=1.2, seed=5, ignore_eos=True)
    engine, other = new_engine(model), new_engine(model)
    for one in (engine, other):
        run(one, request("0", FIRST, session="s"))
    whole = [*FIRST, *wanted[0][0], *TAILS[0]]
    texts = []
    for one, asked in (
        (engine, append("n", TAILS[0], sampling, n=3)),
        (other, request("n", whole, sampling, "s", n=3)),
    ):
        events = run(one, asked)["n"]
        by_index = {}
        for event in events:
            if hasattr(event, "token_ids"):
                by_index.setdefault(event.index, []).extend(event.token_ids)
        texts.append((by_index, finish(events).usage))
    assert texts[0] == texts[1]
    assert engine.sessions.get(KEY).context == other.sessions.get(KEY).context
    assert_same_banks(banks(engine, "s"), banks(other, "s"))


def test_preempted_and_choices_without_room(model, wanted):
    """Two sessions, three requests and a pool of four blocks, of which each needs two in the end."""
    engine = new_engine(model, kv_cache_memory=4 * 512 * model.bytes_per_token, max_num_seqs=4)
    for name in "st":
        run(engine, request(name, FIRST, session=name))
    long = dataclasses.replace(GREEDY, max_tokens=50)
    events = run(engine, append("a", TAILS[0], long, n=2), append("b", TAILS[0], long, session="t"))
    assert engine.scheduler.preemptions
    assert len(tokens(events["a"])) == 100
    for index in range(2):
        mine = [event for event in events["a"] if getattr(event, "index", None) == index]
        assert tokens(mine) == tokens(events["b"])
    assert tokens(events["b"])[:10] == wanted[0][1]


def test_a_request_alone_that_outgrows_the_room_beside_its_sessions_state(model):
    engine = new_engine(model, kv_cache_memory=2 * 512 * model.bytes_per_token)
    run(engine, request("0", FIRST, session="s"))
    long = dataclasses.replace(GREEDY, max_tokens=50)
    assert finish(run(engine, append("a", TAILS[0], long))["a"]).session == "replayed"
    assert engine.scheduler.preemptions == 1


def test_uncommitted(model, wanted):
    engine = new_engine(model)
    run(engine, request("0", FIRST, session="s"))
    for name in "ab":
        assert tokens(run(engine, append(name, TAILS[0], commit=False))[name]) == wanted[0][1]
    assert engine.sessions.get(KEY).commits == 1


def test_nothing_to_append_to(model):
    engine = new_engine(model, session_log_memory=300)
    missing = failed(engine, append("a", TAILS[0]))
    assert isinstance(missing, errors.SessionNotFound)
    assert (missing.param, missing.code) == ("session_id", "session_not_found")
    assert "POST /v1/sessions" in missing.message
    assert engine.sessions.get(KEY) is None
    run(engine, request("b", prompt(60, 1), session="s"), request("c", prompt(60, 2), session="t"))
    lost = failed(engine, append("d", TAILS[0]))
    assert isinstance(lost, errors.SessionLost)
    assert lost.code == "session_lost"
    assert failed(engine, append("d", TAILS[0])).code == "session_lost"  # until it is begun again
    assert finish(run(engine, request("e", FIRST, session="s"))["e"]).session == "lost"
    with pytest.raises(errors.RequestError) as caught:
        engine.add(append("f", TAILS[0], session=None))
    assert caught.value.param == "pacellm.append"
    assert_nothing_held(engine)


def test_a_session_that_expired(model, monkeypatch):
    engine = new_engine(model, session_ttl=100.0)
    run(engine, request("0", FIRST, session="s"))
    session = engine.sessions.get(KEY)
    session.last_used -= 1000
    engine.ops.expire(session)
    assert isinstance(failed(engine, append("a", TAILS[0])), errors.SessionLost)


def test_an_empty_session_is_begun(model):
    engine = new_engine(model)
    engine.call(engine.ops.create(KEY, None))
    run_until_idle(engine)
    ids = [5, 6, 7]
    whole = Append(dict.fromkeys(ENDS, ids), FIRST)
    events = run(engine, request("a", [5, 6, 7], session="s", append=whole))["a"]
    assert finish(events).usage.prompt_tokens == len(FIRST)
    engine.call(engine.ops.reset(KEY))
    assert finish(run(engine, request("b", [5, 6, 7], session="s", append=whole))["b"]).usage.cached_tokens == 0
    refused = dataclasses.replace(whole, whole=errors.RequestError("no", param="messages"))
    engine.call(engine.ops.reset(KEY))
    assert failed(engine, request("c", [5, 6, 7], session="s", append=refused)).message == "no"


def test_by_what_the_history_ends_with(model):
    engine = new_engine(model)
    tails = {end: [10 + number] for number, end in enumerate(ENDS)}
    tails["system"] = errors.RequestError("not after that", param="messages")
    chat = Append(tails, [9])

    def last(outline, sampling):
        run(engine, request("a", FIRST, sampling, session="s", outline=outline))
        events = run(engine, request("b", [9], SamplingParams(max_tokens=0), session="s", append=chat, commit=False))
        end = events["b"][-1]
        if isinstance(end, Failed):
            return end.error.message
        return end.usage.prompt_tokens - len(FIRST), engine.sessions.get(KEY).ending

    silent, one = SamplingParams(max_tokens=0), dataclasses.replace(GREEDY, max_tokens=1)
    user = Outline("user", 3, "answer", 7)
    assert last(user, silent) == (1 - 3, Ending("user", len(FIRST) - 3, (), 7))
    count, ending = last(user, one)  # its only token was never fed
    assert (count, ending.end, ending.kept, len(ending.rest)) == (2, "answer", len(FIRST), 1)
    assert last(Outline("system", 0, "answer"), silent) == "not after that"
    assert "not known" in last(Outline(None, 0, "answer"), silent)
    assert last(Outline(None, 0, "answer"), one)[1].end == "answer"
    token = tokens(run(engine, request("t", FIRST, one))["t"])[0]
    marked = dataclasses.replace(GREEDY, stop_token_ids=frozenset((token,)))
    assert last(user, marked) == (1, Ending("answer", len(FIRST), (), 7))


def test_other_tools_than_the_historys(model):
    engine = new_engine(model)
    shown = Outline("user", 0, "answer", 7)
    run(engine, request("a", FIRST, session="s", outline=shown))
    ids = TAILS[0]
    front = Append(dict.fromkeys(ENDS, ids), ids, needs_tools=True)

    def ask(tools, made):
        return request(f"t{tools}", ids, session="s", append=made, outline=dataclasses.replace(shown, tools=tools))

    error = failed(engine, ask(8, front))
    assert (type(error), error.param) == (errors.NotAppendable, "tools")
    finish(run(engine, ask(7, front))["t7"])
    finish(run(engine, ask(0, Append(dict.fromkeys(ENDS, ids), ids)))["t0"])
    assert engine.sessions.get(KEY).ending.tools == 7
    finish(run(engine, ask(9, Append(dict.fromkeys(ENDS, ids), ids)))["t9"])  # the tail shows them
    assert engine.sessions.get(KEY).ending.tools == 9


def test_a_history_that_is_too_long(model):
    engine = new_engine(model, max_model_len=512)
    run(engine, request("a", FIRST, session="s"))
    made = Append(dict.fromkeys(ENDS, TAILS[2]), TAILS[2], param="prompt")
    error = failed(engine, request("b", TAILS[2], session="s", append=made))
    assert isinstance(error, errors.ContextLengthExceeded)
    assert (error.param, "540" in error.message) == ("prompt", True)
    error = failed(engine, append("c", TAILS[0], dataclasses.replace(GREEDY, max_tokens=40)))
    assert (error.param, "at most 32" in error.message) == ("max_tokens", True)
    full = finish(run(engine, append("d", TAILS[0], SamplingParams(temperature=0, ignore_eos=True)))["d"])
    assert full.usage.completion_tokens == 512 - full.usage.prompt_tokens


def test_a_refusal_does_not_take_others_along(model):
    """The request behind is of the same session, so it can only run once the refused one is gone."""
    engine = new_engine(model)
    events = run(engine, append("a", TAILS[0]), request("b", FIRST, session="s"), append("c", TAILS[0]))
    assert isinstance(events["a"][-1].error, errors.SessionNotFound)
    finish(events["b"])
    finish(events["c"])


def test_a_session_that_is_reset_under_a_preempted_request(model):
    engine = new_engine(model)
    run(engine, request("0", FIRST, session="s"))
    engine.add(append("a", TAILS[0]))
    while not (engine.scheduler.running and engine.scheduler.running[0].generated):
        engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    engine.call(engine.ops.reset(KEY))
    error = run_until_idle(engine)["a"][-1].error
    assert isinstance(error, errors.SessionConflict)


def test_a_folded_log(model):
    engine = new_engine(model, max_model_len=128)
    for number in range(5):
        last = run(engine, request(str(number), prompt(110, number), session="s"))[str(number)]
    assert finish(last).session == "folded"
    error = failed(engine, append("a", TAILS[1]))
    assert (type(error), error.param, "folded" in error.message) == (errors.NotAppendable, "pacellm.append", True)


def test_commits_that_were_lost_with_their_server(model, tmp_path):
    engine = new_engine(model, session_dir=tmp_path)
    run(engine, request("0", FIRST, session="s"))
    engine.eviction.evict_one()
    run_until_idle(engine)
    run(engine, append("1", TAILS[0]))
    crash(engine)
    for _ in range(2):
        engine = new_engine(model, session_dir=tmp_path)
        assert isinstance(failed(engine, append("2", TAILS[1])), errors.NotAppendable)
        engine.close()
    engine = new_engine(model, session_dir=tmp_path)
    run(engine, request("3", FIRST, session="s"))
    finish(run(engine, append("4", TAILS[1]))["4"])
    engine.close()


def test_files_of_an_earlier_version(model, tmp_path, monkeypatch):
    monkeypatch.setattr("pacellm.sessions.records.ending_metadata", lambda ending: {})
    engine = new_engine(model, session_dir=tmp_path)
    run(engine, request("0", FIRST, session="s"))
    engine.close()
    engine = new_engine(model, session_dir=tmp_path)
    assert isinstance(failed(engine, append("1", TAILS[1])), errors.NotAppendable)
    engine.close()


@pytest.mark.parametrize(
    "change", [{"end": "poem"}, {"kept": -1}, {"rest": [97]}, {"rest": ["a"]}, {"more": 1}, {"tools": None}]
)
def test_endings_are_checked_when_read(change):
    good = {"end": "answer", "kept": 7, "rest": [5], "tools": 3}
    assert Ending.from_json(Ending(**{**good, "rest": (5,)}).to_json(), 97) == Ending("answer", 7, (5,), 3)
    with pytest.raises(ValueError):
        Ending.from_json(json.dumps({**good, **change}), 97)
    with pytest.raises(ValueError):
        Ending.from_json("[]", 97)


# -- what prompts leave out ----------------------------------------------------------------------------------


def test_what_a_prompt_leaves_out(model, caplog):
    engine = new_engine(model)

    def ask(ids, **changes):
        events = run(engine, request("a", ids, session="s", **changes))["a"]
        admitted = next(event for event in events if isinstance(event, Admitted))
        assert admitted.kinship == finish(events).kinship
        return tokens(events), admitted.kinship

    answer, found = ask(FIRST)
    assert found == Kinship()
    history = [*FIRST, *answer]
    second, found = ask([*history, *TAILS[0]])
    assert found == Kinship(409, 0)  # the last token was not fed
    _, found = ask([*history, *TAILS[0]])  # the last answer anew
    assert found == Kinship(489, 9)
    other = [*history, *TAILS[0], *[token + 1 for token in second[:-2]], *TAILS[1]]  # or written another way
    _, found = ask(other)
    assert found == Kinship(489, 9)
    assert (engine.stats.dropped_tokens, engine.stats.dropped_histories) == (18, 0)
    assert not caplog.records
    _, found = ask([*FIRST[:100], *TAILS[0]])
    assert found == Kinship(500, 400, drops_most=True)
    assert (engine.stats.dropped_tokens, engine.stats.dropped_histories) == (418, 1)
    assert "begins with 100 of them only" in caplog.text
    assert str(FIRST[0]) not in caplog.text.split("history had")[0]
    _, found = ask(FIRST[:50], sampling=SamplingParams(max_tokens=0))
    assert found == Kinship(179, 129, drops_most=True)


def test_tokens_before_a_stop_string():
    tokenizer = Tokenizer.from_file(str(MODEL_PATH / "tokenizer.json"))
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.encode("The river is long. Stop here, please.", add_special_tokens=False).ids
    for stop in ("St", "Stop here", ". Stop", "river", "The", "please."):
        stream, text = TextStream(vocabulary, (stop,)), ""
        for token in ids:
            text += stream.push(token)
            if stream.stopped_by:
                break
        kept = tokenizer.decode(ids[: stream.num_tokens])
        assert kept.strip() == text.strip(), stop
    # a token that reaches into the stop string counts, unless it is only white space that reaches there
    split = TextStream(vocabulary, ("iver",))
    for token in ids:
        if not split.stopped_by:
            split.push(token)
    assert tokenizer.decode(ids[: split.num_tokens]) == "The river"
