"""What can go wrong before a model is loaded goes wrong then."""

import httpx
import pytest
from huggingface_hub import constants

from pacellm.cli import hub
from pacellm.cli.main import main
from pacellm.errors import ConfigError
from pacellm.server import listening


def test_a_port_is_bound_once():
    with listening.bound("127.0.0.1", 0) as (one,):
        one.listen()
        port = one.getsockname()[1]
        again = listening.bound("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            again.__enter__()


def test_all_addresses_of_a_host_have_one_port():
    with listening.bound("localhost", 0) as sockets:
        assert len({one.getsockname()[1] for one in sockets}) == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--ssl-certfile", "nowhere.pem"], "go together"),
        (["--ssl-certfile", "nowhere.pem", "--ssl-keyfile", "nowhere.pem"], "there is no file nowhere.pem"),
    ],
)
def test_a_line_names_the_flag(flags, says, capsys, monkeypatch, root_logger):
    monkeypatch.setattr("pacellm.cli.serve.build", lambda options: pytest.fail("a model was looked at"))
    assert main(["serve", "--port", "0", *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["serve", "--port", "99999"], ["serve", "--admin-port", "-1"], ["demo", "--tokens", "0"]]
)
def test_numbers_that_cannot_be_are_refused_by_flag(flags, capsys):
    with pytest.raises(SystemExit):
        main(flags)
    assert f"argument {flags[1]}" in capsys.readouterr().err


def test_a_hub_that_is_not_reached_is_one_line(monkeypatch, capsys, root_logger):
    def refused(address, timeout):
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr(hub.httpx, "head", refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert main(["serve", "nobody/nothing", "--port", "0"]) == 2
    assert "nobody/nothing is no directory here, and https://" in capsys.readouterr().err
