"""Client of an OpenAI-compatible server: bounded concurrency, retries, one sentence for what stays wrong.

What may pass (no connection, no answer, 408, 429, 5xx, half an answer, garbage) is asked again, each time
after a longer and partly random pause, and not before the `Retry-After` of the server.  A run ends only when
nothing at all was answered for `patience` seconds; a single request that fails while others succeed, or while
the first one that was answered is answered again, becomes a `Refusal`.  Threads and the standard library: a
server that needs seconds an answer leaves 64 threads time.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import itertools
import json
import os
import queue
import random
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from phoenix.files import UserError

MAX_ANSWER = 64 * 2**20  # bytes
MAX_PAUSE = 30.0  # seconds; a server's Retry-After may ask for more
SILENCE = 3.0  # seconds without any answer before it is said that the server is gone
TRIES = 8  # of one request, while others are answered
LATER = {408, 409, 425, 429}  # with 5xx: the statuses that may pass
BUSY = {429, 502, 503, 504}  # no fault of the request
Read = Callable[[Any], Any]


@dataclass(frozen=True)
class Refusal:
    """What came instead of an answer: the HTTP status (0: `TRIES` failures) and the server's words."""

    status: int
    message: str


@dataclass
class _RetryError(Exception):
    """What may pass.  after: seconds from now, before which the server wants no other request."""

    what: str
    after: float = 0.0
    counts: bool = True  # against the request; a busy server is no fault of it


class Server:
    """One server, or several that answer alike; a request that failed at one goes to the next.

    urls: with or without /v1; key_variable: name of the environment variable with the key, none: no key is
    sent; timeout: seconds without a byte after which a request is sent again; patience: seconds without any
    answer after which a UserError ends the run; pause: seconds before the second try, doubled each time;
    say: gets one line when no answer has come for `SILENCE` seconds, and one when it answers again.
    """

    def __init__(
        self, urls: Sequence[str], *, key_variable: str | None = None, concurrency: int = 64,
        timeout: float = 300.0, patience: float = 1800.0, pause: float = 0.5,
        say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.urls = tuple(_base(url) for url in urls)
        if not self.urls:
            raise UserError("no server is named; write its address, such as http://localhost:8000")
        self.concurrency, self.timeout, self.patience, self.pause = concurrency, timeout, patience, pause
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._headers = {"Content-Type": "application/json"} | _key(key_variable)
        self._lock, self._turn, self._closed = threading.Lock(), itertools.count(), threading.Event()
        self._idle: dict[str, queue.LifoQueue] = {url: queue.LifoQueue() for url in self.urls}
        self._open: set[http.client.HTTPConnection] = set()
        self._not_before = dict.fromkeys(self.urls, 0.0)
        self._answered, self._gone_since = time.monotonic(), None
        self._proof: tuple[str, bytes | None, Read] | None = None  # the first request that was answered

    def models(self) -> dict[str, dict[str, Any]]:
        """What /v1/models lists, by name; {} if the server has no such list."""
        found = self.ask("GET", "/models", None, lambda value: {str(m["id"]): dict(m) for m in value["data"]})
        if isinstance(found, Refusal) and found.status not in (404, 405):
            what = f"{self.urls[0]}/models answers {found.status}: {found.message}"
            raise UserError(f"{what}; check the address")
        return {} if isinstance(found, Refusal) else found

    def ask_all(self, path: str, bodies: Sequence[Any], read: Read) -> list[Any]:
        """POST each body; what `read` makes of each answer, or a Refusal, in the order of the bodies.

        `read` raises KeyError, TypeError, ValueError, IndexError or AttributeError for what is no answer.
        The first UserError of a request stops all others and is raised.
        """
        answers: list[Any] = [None] * len(bodies)
        left, errors, stop = iter(range(len(bodies))), [], threading.Event()

        def work() -> None:
            while not stop.is_set():
                with self._lock:
                    number = next(left, None)
                if number is None:
                    return
                try:
                    answers[number] = self.ask("POST", path, bodies[number], read, stop)
                except BaseException as error:
                    errors.append(error)
                    stop.set()

        workers = [threading.Thread(target=work, daemon=True)
                   for _ in range(min(self.concurrency, len(bodies)))]  # fmt: skip
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.5)  # with a limit, so that a signal's handler runs
                    if errors:
                        raise errors[0]
        except BaseException:
            stop.set()
            self._hang_up()
            raise
        if errors:
            raise errors[0]
        return answers

    def ask(self, method: str, path: str, body: Any, read: Read, stop: threading.Event | None = None) -> Any:
        """One request, sent until it is answered or refused; UserError when no request was for `patience`."""
        data = None if body is None else json.dumps(body).encode()
        stop, failures, pause, begun = stop or self._closed, 0, self.pause, time.monotonic()
        while True:
            url = self._next_url()
            try:
                if stop.wait(self._not_before[url] - time.monotonic()):
                    raise _RetryError("stopped")
                answer = self._send(url, method, path, data, read)
                self._note_answer(url)
                if method == "POST" and not isinstance(answer, Refusal):
                    self._proof = self._proof or (path, data, read)
                return answer
            except _RetryError as failure:
                failures += failure.counts
                since = max(self._answered, begun)
                silent = time.monotonic() - since
                if failures >= TRIES and (self._answered > begun or self._lives(url)):
                    return Refusal(0, failure.what)
                self._note_failure(url, failure, pause, since)
                after = max(min(self._not_before.values()) - time.monotonic(), 0.0)  # until one may be asked
                if stop.is_set() or silent + after > self.patience:
                    wish = f", and wants no request for {failure.after:.0f} s" if failure.after else ""
                    raise UserError(
                        f"{url}{path}: {failure.what}{wish}; {silent:.0f} s without any answer; see to the "
                        "server, then start the same command again: what is finished is kept"
                    ) from None
                stop.wait(min(max(after, pause * random.uniform(0.5, 1.0)), self.patience))
                pause = min(2 * pause, MAX_PAUSE)

    def close(self) -> None:
        self._closed.set()
        self._hang_up()

    def _send(self, url: str, method: str, path: str, data: bytes | None, read: Read) -> Any:
        """The answer or a Refusal of one exchange; _RetryError for what may pass."""
        try:
            status, headers, content = self._exchange(url, method, path, data)
        except (OSError, http.client.HTTPException) as error:
            gone = isinstance(error, (ConnectionRefusedError, socket.gaierror))
            raise _RetryError(_reason(error), counts=not gone) from None
        if status != 200 and (key := self._headers.get("Authorization", "")[7:]):
            content = content.replace(key.encode(), b"(key)")  # some servers repeat it
        if status in LATER or status >= 500:
            what = f"answers {status}: {_message(content)}"
            raise _RetryError(what, _retry_after(headers.get("Retry-After")), counts=status not in BUSY)
        if status != 200:
            self._check_status(url, path, status, content)
            return Refusal(status, _message(content))
        try:
            return read(json.loads(content))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise _RetryError(f"answers what is no reply: {content[:80]!r}") from None

    def _lives(self, url: str) -> bool:
        """Whether what was answered before is answered now."""
        try:
            if self._proof:
                self._send(url, "POST", *self._proof)
                self._note_answer(url)
        except _RetryError:
            return False
        return self._proof is not None

    def _exchange(self, url: str, method: str, path: str, data: bytes | None) -> tuple[int, Any, bytes]:
        """(status, headers, content) over an idle connection if there is one.

        Servers close idle connections after seconds; that shows at the next use, and a new one is opened.
        """
        parts = urllib.parse.urlsplit(url)
        while True:
            try:
                connection, used = self._idle[url].get_nowait(), True
            except queue.Empty:
                kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
                connection, used = kind(parts.netloc, timeout=self.timeout), False
            with self._lock:
                self._open.add(connection)
            try:
                connection.request(method, parts.path + path, data, self._headers)
                response = connection.getresponse()
                content = response.read(MAX_ANSWER)
                if response.length:  # read(n) does not complain about half an answer
                    raise http.client.IncompleteRead(content[-40:], response.length)
            except BaseException as error:
                self._drop(connection)
                if used and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                    continue
                raise
            if response.will_close:
                self._drop(connection)
            else:
                self._idle[url].put(connection)
            return response.status, response.headers, content

    def _check_status(self, url: str, path: str, status: int, content: bytes) -> None:
        """UserError for what is wrong with every request, not with one."""
        if status in (401, 403):
            hint = "set key_variable to the environment variable that holds it"
            raise UserError(f"{url} refuses the key ({status}: {_message(content)}); {hint}")
        if path != "/models" and (status < 400 or status in (404, 405)):
            names = ", ".join(self.models()) or "no list of models"
            raise UserError(f"{url}{path} answers {status}: {_message(content)}; the server has: {names}")

    def _next_url(self) -> str:
        """In turn, one that may be asked now before one that may not."""
        turn = next(self._turn)
        order = [self.urls[(turn + i) % len(self.urls)] for i in range(len(self.urls))]
        return min(order, key=lambda url: max(self._not_before[url], time.monotonic()))

    def _note_answer(self, url: str) -> None:
        with self._lock:
            now = self._answered = time.monotonic()
            gone, self._gone_since = self._gone_since, None
        if gone is not None:
            self._say(f"{url}: answers again after {now - gone:.0f} s")

    def _note_failure(self, url: str, failure: _RetryError, pause: float, since: float) -> None:
        now = time.monotonic()
        with self._lock:
            if failure.after or len(self.urls) > 1:
                self._not_before[url] = max(self._not_before[url], now + max(failure.after, pause))
            first = self._gone_since is None and now - since >= SILENCE
            self._gone_since = since if first else self._gone_since
        if first:
            self._say(f"{url}: {failure.what}; asking again until {self.patience:.0f} s are over")

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def _hang_up(self) -> None:
        """Wake every thread that waits for an answer."""
        with self._lock:
            sockets = [connection.sock for connection in self._open if connection.sock is not None]
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _base(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if not good or "@" in url or parts.query or not url.isascii() or not url.isprintable() or " " in url:
        url = url.rpartition("@")[2]  # no password
        raise UserError(f"{url!r} is no address of a server; write it as http://localhost:8000")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _key(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"the environment variable {variable!r} holds no key for the server; set it")
    return {"Authorization": f"Bearer {key}"}


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer ends in its middle"
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words[:1].lower() + words[1:200]


def _message(content: bytes) -> str:
    """The server's words: `error.message`, `message` or `detail` of a JSON answer, or its beginning."""
    text = content[:2000].decode("utf-8", "replace").strip()
    try:
        value = json.loads(content)
        value = value.get("error", value)
        text = value if isinstance(value, str) else value.get("message") or value.get("detail") or text
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(str(text).split())[:300] or "no words"


def _retry_after(value: str | None) -> float:
    """Seconds from now, of a number or a date; 0 without one or for what is neither."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return min(seconds, 86400.0) if seconds > 0 else 0.0
