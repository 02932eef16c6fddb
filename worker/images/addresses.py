"""Which network addresses an image may be fetched from, checked on the very address that is connected to.

Looking a name up first and connecting by name later would let the answer change in between, so a guarded connection
resolves once, checks, and connects to what it checked.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NameResolutionError, NewConnectionError

from worker.images.errors import ImageError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Addresses that carry an IPv4 address in their last 32 bits: the prefixes of translators (RFC 6052, RFC 2765), and a
#: form long gone.
CARRIERS = tuple(ipaddress.ip_network(prefix) for prefix in ("64:ff9b::/96", "::ffff:0:0:0/96", "::/96"))
#: Not public, whatever the tables of this Python say: protocol assignments (metadata in some clouds), the host of a
#: machine in Azure, translators inside a network (RFC 8215), documentation (RFC 9637), segment routing (RFC 9602).
INSIDE = tuple(
    ipaddress.ip_network(prefix)
    for prefix in ("192.0.0.0/24", "168.63.129.16/32", "64:ff9b:1::/48", "3fff::/20", "5f00::/16")
)

# Its warnings about retries hold the whole URL, with the signature of a presigned one.
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


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
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in INSIDE)


def guarded_pool(
    trusted: Callable[[str, int], bool], opened: list[HTTPConnection], left: Callable[[], float]
) -> urllib3.PoolManager:
    """Connection pools that connect to public addresses only, and to any address of a `trusted(host, port)`.

    `left()`: seconds that may still be spent; it raises when there are none. Every connection made is appended to
    `opened`. A refusal is an ImageError, raised before anything is sent.
    """

    def connect(connection: HTTPConnection) -> socket.socket:
        opened.append(connection)
        host, port = connection.host.strip("[]").rstrip("."), connection.port or connection.default_port
        try:
            addresses = _look_up(host, port, left())
        except (OSError, ValueError) as error:
            raise NameResolutionError(host, connection, socket.gaierror(str(error))) from error
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
            # A name may have any number of addresses, and none of them need answer.
            limit = min(left(), connection.timeout if isinstance(connection.timeout, (int, float)) else left())
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(limit)
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


def _look_up(host: str, port: int, seconds: float) -> list[tuple[int, Any]]:
    """(family, target) of each address of a host, waited for at most `seconds`: a resolver takes its own time."""
    answers: SimpleQueue[list[Any] | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"nobody said in time where {host} is") from None
    if isinstance(answer, Exception):
        raise answer
    return [(family, target) for family, _, _, _, target in answer]
