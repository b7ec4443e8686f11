"""Addresses of the network."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a host is only this machine.

    Args:
        host: a name or an address.
    """
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def may_be_asked(address: str, allow_http: bool) -> bool:
    """Whether an address may be asked: over https, or on this machine.

    Args:
        address: a URL.
        allow_http: whether an http server may be another machine.
    """
    parts = urlsplit(address)
    return parts.scheme == "https" or (parts.scheme == "http" and (allow_http or is_loopback(parts.hostname or "")))
