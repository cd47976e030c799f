"""`python -m dmlr serve`: a loaded model behind OpenAI's chat completions.

Requests that arrive together go through the model together. What this server does not honour is refused, never
ignored. Knows nothing about how an answer is made (api.py does).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dmlr.api import Answer, Model
from dmlr.config import ConfigError
from dmlr.data.images import ImageError, open_image, shorten
from dmlr.limits import Limits
from dmlr.methods import METHODS


class Refused(HTTPException):
    """A request that is not answered, and what OpenAI's clients expect to hear of it."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None):
        super().__init__(status, message)
        self.code, self.param = code, param


async def as_json(request: Request, error: HTTPException) -> JSONResponse:
    """OpenAI's form of an error, of the framework's own ones too."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 504: "server_error"}
    body = {"message": error.detail, "type": kinds.get(error.status_code, "invalid_request_error")}
    body |= {name: getattr(error, name, None) for name in ("param", "code")}
    return JSONResponse({"error": body}, error.status_code)


async def hung_up(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody hears it


# what a request may ask

Kind = tuple[str, tuple[tuple[str, int], ...]]  # method, parameters of `Config`: equal in those that share a batch
# What many clients always send, and asks for nothing.
NEUTRAL = {"temperature": 0, "top_p": 1, "n": 1, "stream": False, "logprobs": False, "tool_choice": "none"}
NEUTRAL |= {"presence_penalty": 0, "frequency_penalty": 0, "response_format": {"type": "text"}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageURL(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # not looked at: sizes are the model's own


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class Own(_Strict):
    idx: int | str | None = None  # what the noise comes from, with the seed; none: a hash of text and images


class Completion(_Strict):
    """A chat completion as far as it is honoured: one user turn, its images before its text, one greedy answer."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    user: str = ""
    dmlr: Own = Own()

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if v is not None and (k not in NEUTRAL or v != NEUTRAL[k])}

    @classmethod
    def of(cls, body: bytes) -> Completion:
        """Refused for what is no request, and for what this server does not honour, by its name."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"] if part not in ("str", "text", "image_url")) or None
        value = json.dumps(first["input"], default=lambda body: body.decode(errors="replace"))
        told = f"{name or 'request'} = {shorten(value, 80)}"
        if first["type"] == "extra_forbidden":
            raise Refused(400, "unsupported_parameter", f"{told} is not honoured here", name)
        raise Refused(400, "invalid_value", f"{told}: {first['msg']}", name)

    def parts(self) -> tuple[str, list[str]]:
        """The text, and where the images are."""
        content = self.messages[0].content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        if not text.strip():
            raise Refused(400, "invalid_value", "the question is empty", "messages")
        return text, [part.image_url.url for part in parts if isinstance(part, ImagePart)]

    def kind(self, name: str) -> Kind:
        """The method in `name:method` (a bare name is DMLR's), and parameters over the model's own."""
        base, _, method = (name, "", "dmlr") if self.model == name else self.model.rpartition(":")
        if base != name or method not in METHODS:
            known = ", ".join(f"{name}:{method}" for method in METHODS)
            raise Refused(404, "model_not_found", f"no model {self.model!r}; there are {known}", "model")
        own = {"max_new_tokens": self.max_completion_tokens or self.max_tokens, "seed": self.seed}
        return method, tuple((name, value) for name, value in own.items() if value is not None)


def picture(url: str, limits: Limits) -> Image.Image:
    """An image of a request, opened."""
    allowed = ("data:", "http://", "https://") if limits.fetch else ("data:",)
    if not url.lower().startswith(allowed):
        raise Refused(400, "invalid_image_url", f"an image's URL must begin with {' or '.join(allowed)}", "messages")
    try:
        return open_image(url, limits.pixels)
    except ImageError as error:
        raise Refused(400, "invalid_image", str(error), "messages") from None


def completion(model: str, answer: Answer) -> dict[str, Any]:
    """A chat completion; all that the method did stands in the field `dmlr`. Refused where there is no answer."""
    if answer.error:
        asked_wrong = answer.error.startswith(("PromptError", "ValueError"))
        raise Refused(400 if asked_wrong else 500, "no_answer", answer.error, "messages" if asked_wrong else None)
    told = answer.to_dict()
    choice = {"index": 0, "message": {"role": "assistant", "content": answer.text}, "logprobs": None}
    choice["finish_reason"] = "length" if told["stop_reason"] == "length" else "stop"
    usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens}
    usage["total_tokens"] = sum(usage.values())
    about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
    return about | {"model": model, "choices": [choice], "usage": usage, "dmlr": told}


# who answers them


@dataclass(frozen=True)
class Waiting:
    request: Request
    question: dict[str, Any]  # as `Model.ask_many` takes one
    kind: Kind
    answer: asyncio.Future[Answer]

    async def given_up(self) -> bool:
        """Whether it took too long, or its client has hung up."""
        if not self.answer.done() and await self.request.is_disconnected():
            self.answer.set_exception(ClientDisconnect())
        return self.answer.done()


class Batcher:
    """The one place that runs the model, in one thread; requests wait here for company."""

    def __init__(self, model: Model, limits: Limits):
        self.model, self.limits, self.worker = model, limits, ThreadPoolExecutor(1, "model")
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def run(self) -> None:
        while True:
            batch = await self._company()
            for kind in dict.fromkeys(one.kind for one in batch):
                await self._answer(kind, [one for one in batch if one.kind == kind and not await one.given_up()])

    async def _company(self) -> list[Waiting]:
        """Requests until none came for `quiet`."""
        batch, end = [await self.queue.get()], time.monotonic() + self.limits.longest
        with suppress(asyncio.TimeoutError):
            while len(batch) < self.limits.batch:
                left = min(self.limits.quiet, end - time.monotonic())
                batch.append(await asyncio.wait_for(self.queue.get(), left))
        return batch

    async def _answer(self, kind: Kind, some: list[Waiting]) -> None:
        method, parameters = kind
        ask = partial(self.model.ask_many, [one.question for one in some], method, **dict(parameters))
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self.worker, ask)
        except Exception as error:  # of what they have in common; the server goes on
            status, code = (400, "invalid_value") if isinstance(error, ConfigError) else (500, "no_answer")
            answers = [Refused(status, code, str(error)) for _ in some]
        for one, answer in zip(some, answers, strict=True):
            if not one.answer.done():  # who waited too long does not any more
                (one.answer.set_exception if isinstance(answer, Exception) else one.answer.set_result)(answer)


def create_app(model: Model, name: str, limits: Limits, key: str = "") -> FastAPI:
    """Serves `name:method` for every method; `key` is what `Authorization: Bearer` must hold, "" lets anybody ask."""
    batcher, places = Batcher(model, limits), asyncio.Semaphore(limits.requests)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise Refused(401, "invalid_api_key", "wrong or missing API key")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    app = FastAPI(
        title="dmlr",
        lifespan=lifespan,
        dependencies=[Depends(check_key)],
        exception_handlers={HTTPException: as_json, ClientDisconnect: hung_up},
        openapi_url=None,  # nor pages about it
    )

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        listed = [{"id": f"{name}:{method}", "object": "model", "created": 0, "owned_by": "dmlr"} for method in METHODS]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> dict[str, Any]:
        if places.locked():
            raise Refused(429, "too_many_requests", f"{limits.requests} requests are under way already")
        async with places:
            try:
                return await asyncio.wait_for(answered(request), limits.seconds)
            except asyncio.TimeoutError:
                raise Refused(504, "timeout", f"no answer within {limits.seconds:g} s") from None

    async def answered(request: Request) -> dict[str, Any]:
        asked = Completion.of(await body_of(request, limits.body))
        kind, (text, urls) = asked.kind(name), asked.parts()
        images = [await asyncio.to_thread(picture, url, limits) for url in urls]
        question = {"question": text, "image": images, "idx": asked.dmlr.idx}
        waiting = Waiting(request, question, kind, asyncio.get_running_loop().create_future())
        batcher.queue.put_nowait(waiting)
        return completion(asked.model, await waiting.answer)

    return app


async def body_of(request: Request, limit: int) -> bytes:
    """Read as it comes, and no further than the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(413, "too_large", f"the request is larger than {limit} bytes")
    return bytes(body)


def serve(model: Model, name: str, limits: Limits, key: str, host: str, port: int) -> None:
    """Until SIGINT or SIGTERM, after which what is under way is answered first."""
    most = math.ceil(limits.seconds)
    uvicorn.run(create_app(model, name, limits, key), host=host, port=port, timeout_graceful_shutdown=most)
