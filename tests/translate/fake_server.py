"""An OpenAI-compatible server of this process: it answers a piece with its letters turned round.

`script` gives, by the number of a POST from 0, what happens instead; `begun` counts the POSTs.
"""

import contextlib
import http.server
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator

Answer = Callable[[http.server.BaseHTTPRequestHandler, dict], None]


class FakeServer:
    """At 127.0.0.1, from `start` to `stop`; a second `start` takes the same port."""

    def __init__(self, models: tuple[str, ...] = ("alma",), script: dict[int, Answer] | None = None):
        self.models, self.script, self.bodies, self.headers = list(models), script or {}, [], []
        self.always: Answer | None = None
        self.busy, self.busiest, self.lock, self.port = 0, 0, threading.Lock(), 0
        self.released = threading.Event()
        self.connections: list[socket.socket] = []
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16  # headers and content in one packet

            def setup(self):
                super().setup()
                outer.connections.append(self.connection)

            def log_message(self, *_):
                pass

            def do_GET(self):
                send(self, 200, {"data": [{"id": name, "owned_by": "fake"} for name in outer.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append((self.path, body))
                    outer.headers.append(dict(self.headers))
                    outer.busy += 1
                    outer.busiest = max(outer.busiest, outer.busy)
                try:
                    act = outer.script.get(number) or outer.always or answer
                    act(self, body)
                finally:
                    with outer.lock:
                        outer.busy -= 1

        class Threads(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_):
                pass

        self._server = Threads(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def reversed_text(body: dict) -> str:
    text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
    return re.search(r"\nEnglish: (.*)\n", text)[1][::-1]


def choice(body: dict, text: str, finish_reason: str = "stop") -> dict:
    inner = {"text": f" {text}"} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 20, "completion_tokens": 7}
    return {"choices": [{"index": 0, "finish_reason": finish_reason, **inner}], "usage": usage}


def answer(handler, body) -> None:
    send(handler, 200, choice(body, reversed_text(body)))


def send(handler, status: int, value, **headers) -> None:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    for name, text in headers.items():
        handler.send_header(name.replace("_", "-"), text)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def status(code: int, message: str = "no", **headers) -> Answer:
    return lambda handler, body: send(handler, code, {"error": {"message": message}}, **headers)


def garbage(handler, body) -> None:
    send(handler, 200, b"<html>It works!</html>")


def wrong_shape(handler, body) -> None:
    send(handler, 200, {"choices": []})


def half_a_line(handler, body) -> None:
    content = json.dumps(choice(body, reversed_text(body))).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def half_without_length(handler, body) -> None:
    content = json.dumps(choice(body, reversed_text(body))).encode()
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def reset(handler, body) -> None:
    linger = struct.pack("ii", 1, 0)  # close sends RST instead of FIN
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True


def no_http(handler, body) -> None:
    handler.wfile.write(b"\x16\x03\x01 what?\r\n\r\n")
    handler.close_connection = True


def silence(server: FakeServer) -> Answer:
    """Never answers, until the server stops."""

    def act(handler, body) -> None:
        server.released.wait(60)
        handler.close_connection = True

    return act


@contextlib.contextmanager
def fake_server(**options) -> Iterator[FakeServer]:
    server = FakeServer(**options)
    try:
        yield server
    finally:
        server.stop()
