"""A chat-completions server on loopback that answers as it is told: well, badly, late or never."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RIGHT = {"answer": "Paris", "verdict": "correct"}


class JudgeServer(ThreadingHTTPServer):
    """`behave(handler, body)` answers each request; `requests` has their paths, headers and bodies."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, behave=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.begin(behave)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def begin(self, behave=None):
        self.behave, self.requests = behave or says(RIGHT), []

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that hang up are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "headers": self.headers, "body": body})
        self.server.behave(self, body)

    def reply(self, status, content, headers=(), length=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        given = {"Content-Type": "application/json", "Content-Length": str(length or len(data)), **dict(headers)}
        self.send_response(status)
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Silent."""


def says(content):
    """A good reply; `content` is its text, or an object that becomes JSON text."""
    text = content if isinstance(content, str) else json.dumps(content)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return sends(
        {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    )


def sends(content, headers=()):
    """Any body, with status 200."""
    return lambda handler, body: handler.reply(200, content, headers)


def refuses(status, headers=()):
    """An error that quotes the key, as some servers do."""

    def behave(handler, body):
        message = f"no, {handler.headers['Authorization']}"
        handler.reply(status, {"error": {"message": message, "type": "t", "code": "c"}}, headers)

    return behave


def in_turn(first, then):
    """One behaviour for the first request, another for all that follow."""
    return lambda handler, body: (then if len(handler.server.requests) > 1 else first)(handler, body)


def pauses(seconds, then):
    def behave(handler, body):
        time.sleep(seconds)
        then(handler, body)

    return behave


def hangs_up(handler, body):
    handler.close_connection = True


def cut_short(handler, body):
    """Half of the bytes that were announced, then the end."""
    handler.reply(200, b'{"id": "1", "choices": [', length=200)
    hangs_up(handler, body)


def drips(handler, body):
    """A byte now and then: never still for long, never finished."""
    handler.reply(200, b"", length=10_000)
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.1)
