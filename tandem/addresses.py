"""host:port, on command lines, in configuration, and as what this machine is to listen on. No gRPC here."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from tandem.errors import ConfigError

# Listening here means on every interface; nobody can dial it.
ANY_ADDRESS = frozenset({"0.0.0.0", "::"})
# What is wrong with a port, and not with the host beside it.
_OF_THE_PORT = {errno.EADDRINUSE: "the port is in use", errno.EACCES: "this user may not have the port"}
# Where a person says it, besides the configuration file.
_FLAGS = {"router": "--{flag}", "worker": "tandem worker --{flag}"}


def dialable(value: str) -> str:
    """The value itself. Raises ValueError unless it is HOST:PORT; an IPv6 address stands in brackets."""
    host, _, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed) or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"{value!r} is not HOST:PORT with a port in [1, 65535]")
    return value


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def loopback_beside(host: str) -> str | None:
    """The loopback address that a listener on `host` does not cover, of the same family; None when it does.

    The near end of an ssh tunnel is dialled on loopback.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        return None  # whoever listens there gets to say so
    address = ipaddress.ip_address(str(found[0][4][0]).partition("%")[0])
    if address.is_loopback or address.is_unspecified:
        return None
    return "127.0.0.1" if address.version == 4 else "::1"


def check_listening(section: str, host: str, port: int, port_key: str = "port") -> None:
    """Raises ConfigError, naming the key and why, when this machine cannot listen there.

    Tried on a socket of its own: quick, before anything slow, and with the system's reason, which gRPC keeps.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise _refusal(section, "host", f"{host!r} cannot be resolved: {reason}") from None
    problems = [_try(family, address) for family, _, _, _, address in found]
    if None in problems:
        return
    problem = problems[0]
    assert problem is not None
    key = port_key if problem.errno in _OF_THE_PORT else "host"
    reason = _OF_THE_PORT.get(problem.errno or 0) or os.strerror(problem.errno or 0).lower()
    raise _refusal(section, key, f"cannot listen on {join_address(host, port)}: {reason}")


def _try(family: int, address: tuple[object, ...]) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does: a port whose last connections are only winding down can be taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _refusal(section: str, key: str, words: str) -> ConfigError:
    flag = _FLAGS[section].format(flag=key.replace("_", "-"))
    return ConfigError(f"{section}.{key} ({flag}): {words}", field=f"{section}.{key}")
