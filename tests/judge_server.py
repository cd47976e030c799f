"""A chat-completions server on loopback that answers as it is told: well, badly, late or never."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RIGHT = {"answer": "Paris", "verdict": "correct"}


def completion(content):
    """The body of a good reply; `content` is its text, or an object that becomes JSON text."""
    text = content if isinstance(content, str) else json.dumps(content)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class JudgeServer(ThreadingHTTPServer):
    """`behave(handler, body)` answers each request. Headers, bodies and the most open at once are recorded."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, behave=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.begin(behave)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def begin(self, behave=None):
        self.behave = behave or says(RIGHT)
        self.requests, self.open, self.most_open = [], 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that hang up are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append({"path": self.path, "headers": self.headers, "body": body})
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            server.behave(self, body)
        finally:
            with server.lock:
                server.open -= 1

    def reply(self, status, content, headers=(), kind="application/json", length=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        given = {"Content-Type": kind, "Content-Length": str(len(data) if length is None else length), **dict(headers)}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Silent."""


def says(content):
    return lambda handler, body: handler.reply(200, completion(content))


def sends(content, **more):
    """Any body, with status 200."""
    return lambda handler, body: handler.reply(200, content, **more)


def refuses(status, headers=()):
    """An error that quotes the key, as some servers do."""

    def behave(handler, body):
        message = f"no, {handler.headers['Authorization']}"
        handler.reply(status, {"error": {"message": message, "type": "t", "code": "c"}}, headers)

    return behave


def without(*parameters, then):
    """400 for each request with one of these parameters, as by a server that does not know them."""
    return lambda handler, body: (refuses(400) if set(parameters) & set(body) else then)(handler, body)


def in_turn(*behaviours):
    """One behaviour per request, the last one for all that follow."""
    left = list(behaviours)
    return lambda handler, body: (left.pop(0) if len(left) > 1 else left[0])(handler, body)


def pauses(seconds, then=lambda handler, body: hangs_up(handler, body)):
    def behave(handler, body):
        handler.server.closing.wait(seconds)
        then(handler, body)

    return behave


def hangs_up(handler, body):
    handler.close_connection = True


def cut_short(handler, body):
    """Half of the bytes that were announced, then the end."""
    data = json.dumps(completion(RIGHT)).encode()
    handler.reply(200, data[: len(data) // 2], length=len(data))
    handler.close_connection = True


def drips(handler, body):
    """A byte now and then: never still for long, never finished."""
    handler.reply(200, b"", length=10_000)
    for _ in range(200):
        if handler.server.closing.wait(0.1):
            break
        handler.wfile.write(b" ")
        handler.wfile.flush()
    handler.close_connection = True
