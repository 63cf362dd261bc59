"""The server under load: which one, which model of it, and whether it may be loaded at all."""

from __future__ import annotations

import ipaddress
import json
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hf_paged.errors import ConfigError

if TYPE_CHECKING:
    import aiohttp


def check_local(url: str, allow_remote: bool) -> None:
    """Refuse to load another machine unless that was asked for.

    Raises:
        ConfigError: the URL is no HTTP URL, its host is unknown, or it isn't this machine.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url must be like http://127.0.0.1:8000, got {url!r}")
    if allow_remote:
        return
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, parts.port or 80)}
    except OSError as error:
        raise ConfigError(f"--url: the host {parts.hostname!r} is not known: {error}") from error
    elsewhere = [address for address in found if not ipaddress.ip_address(str(address).split("%")[0]).is_loopback]
    if elsewhere:
        raise ConfigError(
            f"{parts.hostname!r} ({elsewhere[0]}) is another machine; loading it needs --allow-remote, and its owner's "
            "consent"
        )


async def model_name(session: aiohttp.ClientSession, url: str, wanted: str | None) -> str:
    """The name of the model to ask for: the one wanted, or the first that the server lists.

    Raises:
        ConfigError: no server answers, or the answer isn't a list of models.
    """
    import aiohttp

    try:
        async with session.get(f"{url}/v1/models") as response:
            status, text = response.status, await response.text()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ConfigError(f"no server answers at {url}: {type(error).__name__}: {error}") from error
    if status != 200:
        raise ConfigError(f"{url}/v1/models answers {status}: {text[:200]}")
    names = _names(text)
    if not names:
        raise ConfigError(
            f"{url}/v1/models lists no models; is it a server of OpenAI's protocol? It says: {text[:200]}"
        )
    return wanted or names[0]


def _names(text: str) -> list[str]:
    try:
        return [entry["id"] for entry in json.loads(text)["data"]]
    except (ValueError, KeyError, TypeError):
        return []
