"""What can go wrong before a model is loaded goes wrong then."""

import socket

import pytest

from pacellm.cli.main import main
from pacellm.model import checkpoint


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


def test_a_hub_that_is_not_reached_is_one_line(monkeypatch, capsys, root_logger):
    def refused(address, timeout):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(checkpoint, "getproxies", dict)
    monkeypatch.setattr(checkpoint.constants, "HF_HUB_OFFLINE", False)
    assert main(["serve", "nobody/nothing", "--port", "0"]) == 2
    assert "nobody/nothing is no directory here, and https://" in capsys.readouterr().err
