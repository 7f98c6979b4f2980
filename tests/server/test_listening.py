"""What can go wrong before a model is loaded goes wrong then."""

import socket

import pytest

from pacellm.cli.main import main
from pacellm.errors import ConfigError
from pacellm.model import checkpoint
from pacellm.server import listening


def test_a_port_is_bound_once():
    (one,) = listening.bind("127.0.0.1", 0)
    port = one.getsockname()[1]
    one.listen()
    with one, pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1, port {port} \(Address already in use\)"):
        listening.bind("127.0.0.1", port)


def test_all_addresses_of_a_host_have_one_port():
    sockets = listening.bind("localhost", 0)
    assert len({one.getsockname()[1] for one in sockets}) == 1
    listening.close(sockets)


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
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(checkpoint, "getproxies", dict)
    monkeypatch.setattr(checkpoint.constants, "HF_HUB_OFFLINE", False)
    assert main(["serve", "nobody/nothing", "--port", "0"]) == 2
    assert "nobody/nothing is no directory here, and https://" in capsys.readouterr().err
