"""Flags of ``pacellm serve`` from the command line, the environment, a file and the defaults, in this order."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from pacellm.cli import sources
from pacellm.cli.main import new_parser, serve_options
from pacellm.cli.parser import CommandParser
from pacellm.cli.serve_flags import add_serve


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("PACELLM_")]:
        monkeypatch.delenv(name)


def actions():
    parser = CommandParser()
    add_serve(parser)
    return [one for one in sources.settings(parser).values() if one.dest != "config"]


def sample(action):
    """A value that is not the default, as it is written on the command line; None for flags without one."""
    if action.nargs == 0:
        return None
    if action.choices is not None:
        return next(one for one in action.choices if one != action.default)
    return {"rope_scaling": '{"rope_type": "yarn"}', "working_memory_index": "lexical,activity"}.get(action.dest, "7")


def given(action):
    """What the command line makes of it."""
    if not action.option_strings:
        return getattr(serve_options([sample(action)]), action.dest)
    flag = action.option_strings[-1]  # --no-… where there is one
    return getattr(serve_options([flag] if action.nargs == 0 else [flag, sample(action)]), action.dest)


@pytest.mark.parametrize("action", actions(), ids=lambda action: action.dest)
def test_every_flag_can_be_a_variable_and_a_key(action, monkeypatch, tmp_path):
    wanted, key = given(action), sources.key(action)
    assert wanted != action.default
    value = wanted if action.nargs == 0 else sample(action)
    with monkeypatch.context() as patch:
        patch.setenv(sources.variable(key), str(value))
        assert getattr(serve_options([]), action.dest) == wanted
    (tmp_path / "serve.yml").write_text(yaml.safe_dump({key: value}))
    assert getattr(serve_options(["--config", str(tmp_path / "serve.yml")]), action.dest) == wanted


def test_one_order(monkeypatch, tmp_path):
    file = tmp_path / "serve.yml"
    file.write_text("port: 1\nhost: file\nlog-level: debug\napi-key: [a, b]\ncuda-graphs: false\nsession-sync: true\n"
                    "rope-scaling: {rope_type: yarn}\npa-layers: [1, 3]\nmodel: small\n")  # fmt: skip
    monkeypatch.setenv("PACELLM_CONFIG", str(file))
    monkeypatch.setenv("PACELLM_PORT", "2")
    monkeypatch.setenv("PACELLM_HOST", "variable")
    monkeypatch.setenv("PACELLM_API_KEY", "c,d")
    found = serve_options(["--port", "3", "--cuda-graphs"])
    assert (found.port, found.host, found.log_level, found.log_format) == (3, "variable", "debug", "text")
    assert (found.api_key, serve_options(["--api-key", "e"]).api_key) == (["c", "d"], ["e"])
    assert (found.cuda_graphs, found.session_sync, found.model) == (True, True, "small")
    assert (found.rope_scaling, found.pa_layers) == ({"rope_type": "yarn"}, (1, 3))
    monkeypatch.setenv("PACELLM_SESSION_SYNC", "no")
    assert (serve_options([]).session_sync, serve_options(["other"]).model) == (False, "other")


@pytest.mark.parametrize(
    ("variables", "file", "says"),
    [
        ({"PACELLM_PROT": "1"}, None, "the variable PACELLM_PROT is unknown; did you mean PACELLM_PORT?"),
        ({"PACELLM_PORT": "99999"}, None, "PACELLM_PORT: '99999' is not a port"),
        ({"PACELLM_MAX_NUM_SEQS": "many"}, None, "PACELLM_MAX_NUM_SEQS: 'many' is not of type int"),
        ({"PACELLM_SESSION_SYNC": "perhaps"}, None, "PACELLM_SESSION_SYNC must be true or false"),
        ({"PACELLM_LOG_LEVEL": "loud"}, None, "'loud' is none of debug, info"),
        ({"PACELLM_CONFIG": "/no/such/file"}, None, "cannot read /no/such/file"),
        ({}, "max_model_len: 8K", "the key 'max_model_len' is unknown; did you mean max-model-len?"),
        ({}, "config: other.yml", "the key 'config' is unknown"),
        ({}, "zebra: 1", "the key 'zebra' is unknown; it takes the names of pacellm serve's flags"),
        ({}, "port:", "port has no value"),
        ({}, "port: [", "is not YAML"),
        ({}, "- port", "must hold flags' names and their values"),
        ({}, "dtype: int8", "'int8' is none of auto"),
        ({}, "port: true", "'True' is not a port"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(variables, file, says, monkeypatch, tmp_path, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "serve.yml").write_text(file or "")
    with pytest.raises(SystemExit) as end:
        serve_options([] if file is None else ["--config", str(tmp_path / "serve.yml")])
    printed = capsys.readouterr().err
    assert (end.value.code, printed.count("\n")) == (2, 1)
    assert says in printed


def test_what_kubernetes_sets_for_a_service_of_our_name_is_left_alone(monkeypatch):
    for name, value in (("SERVICE_HOST", "10.0.0.1"), ("SERVICE_PORT", "8000"), ("SERVICE_PORT_HTTP", "8000"),
                        ("PORT", "tcp://10.0.0.1:8000"), ("PORT_8000_TCP", "tcp://10.0.0.1:8000"),
                        ("PORT_8000_TCP_ADDR", "10.0.0.1"), ("METRICS_SERVICE_HOST", "10.0.0.2")):  # fmt: skip
        monkeypatch.setenv(f"PACELLM_{name}", value)
    assert serve_options([]).port == 8000


def test_other_commands_have_no_such_sources(monkeypatch):
    monkeypatch.setenv("PACELLM_PROT", "1")
    assert new_parser(["chat"]).parse_args(["chat"]).url == "http://127.0.0.1:8000"
    monkeypatch.setenv("PACELLM_URL", "http://elsewhere/v1")
    assert new_parser(["chat"]).parse_args(["chat"]).url == "http://elsewhere/v1"


def test_help_is_grouped_with_defaults_and_completed_by_a_shell():
    done = subprocess.run([sys.executable, "-P", "-m", "pacellm", "serve", "--help"], capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "300"}, timeout=60)  # fmt: skip
    for line in ("\nsessions:\n", "--port PORT", "(default: 8000)", "(default: 64M)", "(default: on)"):
        assert line in done.stdout
    assert "(default: False)" not in done.stdout + json.dumps(vars(serve_options([])), default=str)
    script = subprocess.run([sys.executable, "-P", "-m", "pacellm", "completion", "bash"], capture_output=True,
                            text=True, timeout=60).stdout  # fmt: skip
    asked = f'{script}\nCOMP_WORDS=(pacellm serve --max-mod) COMP_CWORD=2\n_shtab_pacellm; echo "${{COMPREPLY[@]}}"'
    found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "--max-model-len", found.stderr
