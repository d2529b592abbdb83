"""Switch the network off in a process: put this folder on PYTHONPATH, and only this machine can be reached.

Python imports a module named `sitecustomize` at every start, so that programs started by a test are covered as well.
What a library says when it finds the network off stays its own: no offline switch of any library is set here.
"""

import ipaddress
import socket

MESSAGE = "network is off in tests"


def is_local(host: object) -> bool:
    "True for a name or an address of this machine's loopback."
    if host is None or host in ("", b"", "localhost", b"localhost"):
        return True
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(text.partition("%")[0]).is_loopback
    except ValueError:
        return False


def guard(sock: socket.socket, address: object) -> None:
    "Raise unless `address` is on this machine; sockets of the file system are."
    if sock.family in (socket.AF_INET, socket.AF_INET6) and not (isinstance(address, tuple) and is_local(address[0])):
        raise OSError(f"{MESSAGE}: {address}")


def install() -> None:
    "Replace what opens connections and looks names up; a second call changes nothing."
    if getattr(socket, "_network_is_off", False):
        return
    connect, connect_ex, sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto

    def local_connect(self: socket.socket, address: object) -> None:
        guard(self, address)
        return connect(self, address)

    def local_connect_ex(self: socket.socket, address: object) -> int:
        guard(self, address)
        return connect_ex(self, address)

    def local_sendto(self: socket.socket, data: bytes, *args: object) -> int:
        guard(self, args[-1])
        return sendto(self, data, *args)

    def local_only(look_up):
        def looked_up(host, *args, **kwargs):
            if not is_local(host) and host != socket.gethostname() and not is_address(host):
                raise OSError(f"{MESSAGE}: {host}")
            return look_up(host, *args, **kwargs)

        return looked_up

    socket.socket.connect = local_connect
    socket.socket.connect_ex = local_connect_ex
    socket.socket.sendto = local_sendto
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        setattr(socket, name, local_only(getattr(socket, name)))
    socket._network_is_off = True


def is_address(host: object) -> bool:
    "True for a literal address: looking it up asks nobody, and connecting to it is guarded."
    try:
        ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return True


install()
