"""An OpenAI-compatible server whose conversations are held within a budget: POST /v1/chat/completions.

    pip install 'retention[serve]'
    python examples/server.py --model llava-hf/llava-1.5-7b-hf --gates outputs/latest/gates --budget 256MiB
    python examples/server.py --policy keydiff --budget 10%            # the embedded model, a heuristic

Clients send the whole chat each time, as that interface has it; a conversation that the server knows goes on over its
cache, so that only the new messages are read. Where --gates is a folder with several gate sets, a request's model names
the one that its conversation is scored by, by default the first. Idle conversations hold at most --pool bytes; the oldest are kept on disk
below --folder. An answer whose client is gone ends with the step under way. (transformers' own server makes its caches
itself and takes no other, so this one stands beside it.)
"""

import argparse
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from retention.budget import Budget
from retention.serving.conversation import Conversation
from retention.serving.decoding import Answer
from retention.serving.pipeline import Pipeline, pipeline
from retention.serving.pool import Pool, digest


class Request(BaseModel):
    """What of the chat completions interface is read."""

    messages: list[dict[str, Any]]
    model: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: str | list[str] | None = None
    stream: bool = False

    def decoding(self) -> dict[str, Any]:
        """Of this request, as `Decoding` names it."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        told = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "stop": tuple(stop)}
        return {"max_new_tokens": self.max_tokens, **told}


class Chats:
    """Finds the conversation that a request goes on with, and keeps it for the next one."""

    def __init__(self, pipe: Pipeline, pool: Pool, name: str) -> None:
        self.pipe, self.pool = pipe, pool
        self.models = [name, *pipe.gate_sets]
        """What a request may name: the model under its first gates, or a gate set."""

    def gates(self, request: Request) -> str | None:
        """The gate set that a request asks for."""
        return None if request.model in (None, self.models[0]) else request.model

    def begin(self, request: Request) -> tuple[Answer, Conversation]:
        """The answer under way."""
        messages = request.messages
        known = None
        if len(messages) > 2 and messages[-2].get("role") == "assistant":
            known = self.pool.take(digest(messages[:-1], self.gates(request)))
        conversation = known or self.pipe.conversation(self.gates(request))
        answer = conversation.stream(messages[-1:] if known else messages, **request.decoding())
        return answer, conversation

    def keep(self, request: Request, conversation: Conversation, said: str) -> None:
        """For the next request, which will hold this answer."""
        messages = [*request.messages, {"role": "assistant", "content": said}]
        self.pool.put(digest(messages, self.gates(request)), conversation)


def create(pipe: Pipeline, pool: Pool, name: str = "retention") -> FastAPI:
    """The application."""
    app, chats = FastAPI(title="retention"), Chats(pipe, pool, name)

    def chunk(id: str, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        told = {"id": id, "object": "chat.completion.chunk", "created": int(time.time()), "model": name}
        return f"data: {json.dumps({**told, 'choices': [choice]})}\n\n"

    def pieces(id: str, request: Request, answer: Answer, conversation: Conversation) -> Iterator[str]:
        try:
            yield chunk(id, {"role": "assistant", "content": ""})
            for text in answer:
                if text:
                    yield chunk(id, {"content": text})
            chats.keep(request, conversation, answer.text)
            yield chunk(id, {}, answer.reason)
            yield "data: [DONE]\n\n"
        finally:  # where the client is gone, at any time and in any thread: so nothing here may wait for a lock
            answer.cancel()

    @app.post("/v1/chat/completions", response_model=None)
    def complete(request: Request) -> JSONResponse | StreamingResponse:
        if request.model not in (None, *chats.models):
            raise HTTPException(404, f"expected a model among {', '.join(chats.models)}, got {request.model!r}")
        try:
            answer, conversation = chats.begin(request)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        id = f"chatcmpl-{uuid.uuid4().hex}"
        if request.stream:
            return StreamingResponse(pieces(id, request, answer, conversation), media_type="text/event-stream")
        try:
            said = answer.whole()
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        chats.keep(request, conversation, said)
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "message": message, "finish_reason": answer.reason}
        usage = {"completion_tokens": len(answer.tokens), "cache_bytes": conversation.bytes}
        told = {"id": id, "object": "chat.completion", "created": int(time.time()), "model": name}
        return JSONResponse({**told, "choices": [choice], "usage": usage})

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        data = [{"id": one, "object": "model", "owned_by": "retention"} for one in chats.models]
        return {"object": "list", "data": data}

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"idle_conversations": len(pool), "idle_bytes": pool.bytes}

    return app


def main() -> None:
    """Load, and serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--gates", help="an artefact, or a folder of several")
    parser.add_argument("--policy")
    parser.add_argument("--budget", default="256MiB", help="of one conversation")
    parser.add_argument("--pool", default="4GiB", help="bytes that idle conversations hold together")
    parser.add_argument("--folder", type=Path, default=Path("outputs/conversations"))
    parser.add_argument("--active", type=int, default=8, help="answers written at a time")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    import uvicorn

    from retention.models.load import load_frozen

    try:
        room = Budget.parse(options.pool)
        model, processor = load_frozen(options.model)
        task = "text-generation" if not hasattr(processor, "tokenizer") else "image-text-to-text"
        own = {"gates": options.gates, "budget": options.budget, "policy": options.policy, "active": options.active}
        pipe = pipeline(task, model=model, processor=processor, **own)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    with pipe:
        uvicorn.run(create(pipe, Pool(pipe, int(room.amount), options.folder)), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
