"""An OpenAI-compatible endpoint that answers the rows. A request that fails for a time is sent again."""

from __future__ import annotations

import email.utils
import json
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from tokenpacker.batch.batch_rows import Reply, RowError
from tokenpacker.whole_files import GO_ON

CONNECT_S = 10.0
NOTE_S = 30.0  # between two notes
RETRIED = (408, 409, 429)  # as OpenAI's client does, beside 5xx
FIRST_WAIT_S, LONGEST_WAIT_S, LONGEST_RETRY_AFTER_S = 0.5, 30.0, 600.0


class Endpoint:
    """Sends each request until it is answered.

    Args:
        url: the API's base, such as `http://localhost:8000/v1`; `/v1` is added to one without a path.
        api_key: sent as a bearer token.
        retries: after the first try, for errors that may pass: no connection, 408, 409, 429 and 5xx.
        timeout_s: for each try.
        connections: most requests at a time.
        note: is told what goes on if requests fail again and again, at most twice a minute.

    Raises:
        ValueError: if `url` is no HTTP address.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        retries: int = 8,
        timeout_s: float = 600,
        connections: int = 32,
        note: Callable[[str], object] = lambda said: None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--endpoint {url} is no address; write for example http://localhost:8000/v1")
        base = url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
        self.url, self.retries = f"{base}/chat/completions", retries
        self.note, self.next_note = note, 0.0
        headers = {"Content-Type": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self.client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout_s, connect=CONNECT_S), limits=limits)

    def __call__(self, body: dict[str, Any]) -> Reply:
        """Answers the body of a request.

        Raises:
            RowError: if this request got no answer.
            ConnectionError: if no request can be answered; it ends the run, and the other rows are left for the next.
        """
        content = json.dumps(body).encode()  # httpx would not escape half a character, and fail on it
        for attempt in range(self.retries + 1):
            wait = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1)
            try:
                response = self.client.post(self.url, content=content)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                said = f"cannot be reached ({_said(error)})"
                if attempt == self.retries:
                    raise ConnectionError(f"{self.url} {said}; {GO_ON}") from None
            except httpx.RequestError as error:
                said = f"does not answer ({_said(error)})"
                if attempt == self.retries:
                    raise RowError("connection_error", f"no answer in {attempt + 1} tries ({_said(error)})") from None
            else:
                if attempt == self.retries or not _may_pass(response.status_code):
                    return self._reply(response)
                said = f"answers {response.status_code}"
                wait = max(wait, _asked_wait(response.headers.get("retry-after", "")))
            if attempt >= 1 and time.monotonic() >= self.next_note:  # a request that fails once is nothing unusual
                self.next_note = time.monotonic() + NOTE_S
                self.note(f"{self.url} {said}; trying again, {self.retries - attempt} more times")
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()

    def _reply(self, response: httpx.Response) -> Reply:
        if response.status_code == 401:
            raise ConnectionError(f"{self.url} refuses the key (401); name its variable with --api-key-env; {GO_ON}")
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            said = f"status {response.status_code} with a body that is no JSON object: {response.text[:200]!r}"
            raise RowError("invalid_response", f"{self.url} answered {said}")
        return Reply(response.status_code, body, response.headers.get("x-request-id"))


def _may_pass(status: int) -> bool:
    return status in RETRIED or status >= 500


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _asked_wait(retry_after: str) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or a date; 0 for anything else."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(seconds, LONGEST_RETRY_AFTER_S) if seconds > 0 else 0.0
