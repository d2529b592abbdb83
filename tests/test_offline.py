"""The switch that takes the network away works, here and in programs started from here."""

import socket
import subprocess
import sys

import pytest

FAR = ("192.0.2.1", 80)  # an address kept for examples: nobody answers there


def test_connections_to_other_machines_raise():
    with pytest.raises(OSError, match="network is off in tests"):
        socket.create_connection(FAR, timeout=5)
    with pytest.raises(OSError, match="network is off in tests"):
        socket.socket().connect_ex(FAR)
    with pytest.raises(OSError, match="network is off in tests"):
        socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", FAR)


def test_names_of_other_machines_are_not_looked_up():
    with pytest.raises(OSError, match="network is off in tests"):
        socket.getaddrinfo("example.org", 80)


def test_this_machine_stays_reachable(tmp_path):
    with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
    ours, theirs = socket.socketpair()
    ours.sendall(b"x")
    assert theirs.recv(1) == b"x"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))


def test_programs_started_from_here_are_offline_too():
    code = f"import socket; socket.create_connection({FAR!r}, timeout=5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OSError: network is off in tests" in done.stderr
