"""A server that speaks OpenAI's chat completions: its client, what it offers, whether it lives, how it
refuses.

The key comes from OPENAI_API_KEY alone, and is scrubbed from whatever a server says.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.captioners.settings import address_faults
from pipeline.errors import SettingsError, UnreachableError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

TRANSIENT = (408, 409, 429)  # and all from 500 on: the same request may pass later
PROBE_S = 10.0  # a list of models is a matter of milliseconds for a server that lives


def models_of(base_url: str, *, timeout: float = PROBE_S) -> list[str]:
    """Names of the models that a server offers; one try of at most `timeout` seconds, to be made before
    anything starts.

    Raises:
        ConnectionError: nothing answers there, or not now.
        ValueError: the key is refused, or what answers there is no such server.
    """
    check_address(base_url)

    async def ask() -> list[str]:
        async with client_of(base_url, timeout) as client:
            return await offered(client, base_url)

    return asyncio.run(ask())


async def offered(client: AsyncOpenAI, base_url: str) -> list[str]:
    import openai

    try:
        body = (await client.models.with_raw_response.list()).content
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except openai.APIConnectionError as error:
        message = (
            f"base_url={base_url}: {short(str(error.__cause__ or error))}; start the server or mend "
            "--base-url."
        )
        raise UnreachableError(message) from None
    except openai.APIStatusError as error:
        code, text = error.status_code, reason(error)
        if code in TRANSIENT or code >= 500:
            message = (
                f"base_url={base_url}: not ready ({code}: {text}); wait for the server, then run the same "
                "command again."
            )
            raise UnreachableError(message) from None
        message = key_fault(base_url, code, text) if code in (401, 403) else ""
        raise SettingsError(message or _no_models(base_url, f"{code}: {text}")) from None
    except (ValueError, KeyError, TypeError):
        raise SettingsError(_no_models(base_url, "no JSON list of models")) from None


async def is_up(client: AsyncOpenAI) -> bool:
    try:
        async with asyncio.timeout(PROBE_S):
            await offered(client, "")
    except (ConnectionError, TimeoutError):
        return False
    except ValueError:
        return True  # something answers, if not with models: some gateways list none
    return True


def client_of(base_url: str, timeout: float) -> AsyncOpenAI:
    """A client that tries once, follows no redirection (pictures and key stay at this address) and, on
    loopback, no proxy."""
    import openai

    http = openai.DefaultAsyncHttpxClient(
        timeout=timeout, follow_redirects=False, trust_env=not _is_loopback(base_url)
    )
    return openai.AsyncOpenAI(
        api_key=api_key(), base_url=base_url, timeout=timeout, max_retries=0, http_client=http
    )


def _is_loopback(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def api_key() -> str:
    # Local servers ask for none, but the header must hold one.
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
    if not (key.isascii() and key.isprintable()):
        # Caught here because the HTTP library's own complaint quotes the key.
        message = "OPENAI_API_KEY: holds characters that no HTTP header can carry; set it again."
        raise SettingsError(message)
    return key


def check_address(base_url: str) -> None:
    if faults := address_faults(base_url):
        raise SettingsError(faults[0])


def key_fault(base_url: str, code: int, text: str) -> str:
    return (
        f"OPENAI_API_KEY: refused by {base_url} ({code}: {text}); set the environment variable to that "
        "server's key."
    )


def _no_models(base_url: str, why: str) -> str:
    return f"base_url={base_url}: no OpenAI-compatible server there ({why}); most addresses end in /v1."


def reason(error: APIStatusError) -> str:
    """What the server said, in one short line."""
    body: Any = error.body
    said = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    return short(str(said or error.message))


def short(text: str) -> str:
    """One line of at most 300 characters without the key, which servers like to quote; scrubbed before it is
    cut."""
    key = api_key()
    text = " ".join((text if key == "EMPTY" else text.replace(key, "***")).split())
    return text if len(text) <= 300 else text[:297] + "..."


def retry_after_s(error: APIStatusError) -> float:
    """Seconds that the server asks to wait, given as seconds or as a date; 0 if it does not ask."""
    value = error.response.headers.get("retry-after", "")
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, wait_s) if math.isfinite(wait_s) else 0.0
