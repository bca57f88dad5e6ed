"""Who may ask, as arguments say it: origins, names of this machine, a key.

What could never match what a client sends is refused: it would only look like a
setting.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Sequence

from ..errors import RequestError, shorten

API_KEY_VARIABLE = "MLX_GEMMA_MTP_API_KEY"
ANY = "*"
# As browsers send it: lower case, no path, no port that goes without saying.
_ORIGIN = re.compile(
    r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._~-]+)(?::([0-9]{1,5}))?"
)
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_PORTS = {"http": "80", "https": "443"}


def origins(given: Sequence[str]) -> tuple[str, ...]:
    """Origins as they are compared.

    Args:
        given: One or more in each, with commas as mlx-lm has them or as JSON like
            vLLM's.

    Raises:
        RequestError: One of them is none.
    """
    return tuple(_origin(each) for text in given for each in _listed(text))


def _listed(text: str) -> Iterator[str]:
    try:
        found = json.loads(text) if text.startswith("[") else text.split(",")
    except ValueError:
        found = [text]
    return (str(each).strip() for each in found)


def _origin(given: str) -> str:
    match = _ORIGIN.fullmatch(given.lower())
    if given in (ANY, "null"):
        return given
    if match is None or int(match[3] or 1) not in range(1, 65536):
        raise RequestError(
            "--allowed-origins must be origins such as https://example.org: got "
            f"{shorten(given)}. Leave out path, query and the last slash; * is for all."
        )
    scheme, host, port = match.groups()
    is_said = port is not None and port != _PORTS.get(scheme)
    return f"{scheme}://{host}:{port}" if is_said else f"{scheme}://{host}"


def host_names(given: Sequence[str]) -> tuple[str, ...]:
    """Names as they are compared with the Host header, its port left out.

    Raises:
        RequestError: One of them is none.
    """
    return tuple(_host_name(name) for name in given)


def _host_name(given: str) -> str:
    name = given.lower().rstrip(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if _NAME.fullmatch(name) is None:
            raise RequestError(
                "--allowed-hosts must be names such as mac.local, without a port: got "
                f"{shorten(given)}. With --api-key any name will do."
            ) from None
    return name


def api_key(given: str | None) -> str | None:
    """The key of the flag, or else the environment's.

    Raises:
        RequestError: No header can carry it.
    """
    key = os.environ.get(API_KEY_VARIABLE) if given is None else given
    if key is None:
        return None
    if not (key and key.isascii() and key.isprintable() and key == key.strip()):
        name = API_KEY_VARIABLE if given is None else "--api-key"
        raise RequestError(
            f"{name} must hold printable ASCII characters, no spaces around them: "
            "that is what a header can carry. Choose another one, or leave it out."
        )
    return key
