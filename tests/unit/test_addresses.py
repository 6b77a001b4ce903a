"""Addresses that users say: refused early, by the name of the key, with the system's reason."""

from __future__ import annotations

import errno
import os
import signal
import socket
from typing import Any

import pytest

from tandem.addresses import check_listening, dialable, loopback_beside
from tandem.config import load_config
from tandem.errors import ConfigError
from tandem.process.entry import starting
from tandem.types import Role
from tandem.worker import main
from tandem.worker.arguments import parse_arguments


@pytest.mark.parametrize("value", ["10.0.0.1:8700", "host:1", "[::1]:65535"])
def test_an_address_that_can_be_dialled(value: str) -> None:
    assert dialable(value) == value


@pytest.mark.parametrize("value", ["", "host", ":80", "host:", "host:0", "host:65536", "host:x", "host:-1", "::1:80"])
def test_an_address_that_cannot(value: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        dialable(value)


def test_a_free_port_can_be_listened_on() -> None:
    check_listening("worker", "127.0.0.1", 0)
    check_listening("worker", "localhost", 0)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("no-such-host.invalid", r"worker.host (tandem worker --host): 'no-such-host.invalid' cannot be resolved"),
        ("a..b", "cannot be resolved"),
        ("192.0.2.1", f"cannot listen on 192.0.2.1:0: {os.strerror(errno.EADDRNOTAVAIL).lower()}"),
    ],
)
def test_a_host_that_is_not_ours_says_why(host: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_listening("worker", host, 0)
    assert words in caught.value.message
    assert caught.value.field == "worker.host"


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            check_listening("router", "127.0.0.1", port)
    assert caught.value.message == f"router.port (--port): cannot listen on 127.0.0.1:{port}: the port is in use"


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        ({"host": "no-such-host.invalid"}, "worker.host (tandem worker --host): 'no-such-host.invalid' cannot be"),
        ({"host": "0.0.0.0"}, "say worker.advertise (tandem worker --advertise) too"),
    ],
)
def test_a_worker_checks_its_address_before_it_loads_a_model(
    worker: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(main, "EngineThread", never)
    config = load_config(overrides={"worker": worker})
    assert main.run_worker(main.WorkerKind(frozenset(Role), {}), config, "127.0.0.1:1") == 2
    assert words in capsys.readouterr().err


def test_advertise_is_checked_with_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"worker\.advertise: 'nowhere' is not HOST:PORT"):
        load_config(overrides={"worker": {"advertise": "nowhere"}})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus"], "python -m prefill_worker: error:"),
        (["--router", "nowhere"], "argument --router: 'nowhere' is not HOST:PORT"),
        (["--router", "a:1", "--advertise", "b"], "argument --advertise: 'b' is not HOST:PORT"),
        (["--router", "a:1", "--port", "99999"], "config key worker.port"),
    ],
)
def test_a_workers_command_line_names_the_command_and_the_flag(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments("python -m prefill_worker", "A prefill worker.", arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_starting_quiets_grpc_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    with starting():
        assert os.environ["GRPC_VERBOSITY"] == "DEBUG"
    monkeypatch.delenv("GRPC_VERBOSITY")
    with starting():
        assert os.environ["GRPC_VERBOSITY"] == "NONE"
    monkeypatch.delenv("GRPC_VERBOSITY")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", None),
        ("127.0.0.9", None),
        ("localhost", None),
        ("0.0.0.0", None),
        ("::", None),
        ("::1", None),
        ("192.0.2.7", "127.0.0.1"),
        ("2001:db8::7", "::1"),
        ("no-such-host.invalid", None),
    ],
)
def test_a_listener_on_one_address_listens_on_loopback_beside_it(host: str, loopback: str | None) -> None:
    assert loopback_beside(host) == loopback
