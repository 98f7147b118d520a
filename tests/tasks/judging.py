"""A small server that speaks OpenAI's chat completions and answers by a rule."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

VERSION = "judge-1-2026-01-31"


class Endpoint:
    """What was asked of a server, and where it is."""

    def __init__(self, rule: Callable[[str], str], failures: list[int]) -> None:
        self.rule, self.failures = rule, failures
        self.asked: list[dict[str, Any]] = []
        """Bodies of all requests, each with the key it came with."""
        self.url = ""


@contextmanager
def judging(rule: Callable[[str], str], failures: tuple[int, ...] = ()) -> Iterator[Endpoint]:
    """A server on this machine; its first answers are the HTTP statuses of `failures`."""
    told = Endpoint(rule, list(failures))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.asked.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            status = told.failures.pop(0) if told.failures else 200
            said = {"role": "assistant", "content": told.rule(body["messages"][-1]["content"])}
            choice = {"index": 0, "message": said, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            reply = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": VERSION,
                "choices": [choice],
                "usage": usage,
            }
            sent = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, format: str, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told.url = f"http://127.0.0.1:{server.server_port}/v1"
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield told
        finally:
            server.shutdown()
