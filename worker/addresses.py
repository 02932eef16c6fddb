"""Which network addresses an image may be fetched from, checked on the very address that is connected to.

Looking a name up first and connecting by name later would let the answer change in between, so a guarded connection
resolves once, checks, and connects to what it checked.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NameResolutionError, NewConnectionError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Addresses that carry an IPv4 address in their last 32 bits: the translation prefix (RFC 6052), and a form long gone.
CARRIERS = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))

# Its warnings about retries hold the whole URL, with the signature of a presigned one.
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


class ImageError(Exception):
    """An image that cannot be had. `error`: what is wrong, `hint`: what to do, `status`: HTTP status for the client."""

    def __init__(self, error: str, hint: str, status: int = 400) -> None:
        super().__init__(f"{error} {hint}")
        self.error = error
        self.hint = hint
        self.status = status


def is_public(address: str) -> bool:
    """Whether an IP address (as `getaddrinfo` gives it) belongs to the public internet.

    IPv4 addresses inside IPv6 ones (mapped, 6to4, NAT64) count as what they lead to.
    """
    ip: IPAddress = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if embedded is None and any(ip in network for network in CARRIERS):
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            ip = embedded
        elif ip.teredo is not None or ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


def guarded_pool(trusted: Callable[[str, int], bool], opened: list[HTTPConnection]) -> urllib3.PoolManager:
    """Connection pools that connect to public addresses only, and to any address of a `trusted(host, port)`.

    Every connection made is appended to `opened`. A refusal is an ImageError, raised before anything is sent.
    """

    def connect(connection: HTTPConnection) -> socket.socket:
        opened.append(connection)
        host, port = connection.host.strip("[]").rstrip("."), connection.port or connection.default_port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise NameResolutionError(host, connection, socket.gaierror(str(error))) from error
        addresses = [(family, target) for family, _, _, _, target in found]
        if not trusted(host, port):
            addresses = [entry for entry in addresses if is_public(str(entry[1][0]))]
            if not addresses:
                raise ImageError(
                    f"The image host {host} is at a private address.",
                    "If images may come from there, add the host to BALD_SAM_ALLOWED_HOSTS.",
                    403,
                )
        failure: OSError | None = None
        for family, target in addresses:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(connection.timeout if isinstance(connection.timeout, (int, float)) else None)
                sock.connect(target)
            except OSError as error:
                sock.close()
                failure = error
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
        raise NewConnectionError(connection, f"{host}: {failure}") from failure

    class GuardedHTTPConnection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self)

    class GuardedHTTPSConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self)

    class HTTPPool(urllib3.HTTPConnectionPool):
        ConnectionCls: Any = GuardedHTTPConnection

    class HTTPSPool(urllib3.HTTPSConnectionPool):
        ConnectionCls: Any = GuardedHTTPSConnection

    manager = urllib3.PoolManager(num_pools=8)
    manager.pool_classes_by_scheme = {"http": HTTPPool, "https": HTTPSPool}
    return manager
