"""The endpoint: answers equal a run's, what is not honoured is a typed error, nothing is lost under load."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx2
import openai
import psutil
import pytest
from starlette.testclient import TestClient
from tiny import noise_image

import dmlr
from dmlr import methods
from dmlr.api import Answer
from dmlr.config import Config, ConfigError
from dmlr.data.examples import load_dataset
from dmlr.limits import Limits
from dmlr.run import evaluate
from dmlr.serve import create_app

ROOT = Path(__file__).parents[1]
SUITES = ("mathematics", "visual", "composition")


def uri(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


PICTURE = uri(noise_image(0, 56, 56))


def request(text="How many?", *images, model="shapes:vanilla", **more):
    content = [*({"type": "image_url", "image_url": {"url": url}} for url in images), {"type": "text", "text": text}]
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


class Scripted:
    """A model that says each question back once `gate` is open, and remembers who was asked together."""

    def __init__(self):
        self.gate, self.batches = threading.Event(), []

    def ask_many(self, questions, method, **parameters):
        self.batches.append(([question["question"] for question in questions], method, parameters))
        self.gate.wait(20)
        if parameters.get("seed") == 13:
            raise ConfigError("seed = 13 brings bad luck")
        texts = [question["question"] for question in questions]
        said = [methods.Answer(text, "", "eos_token", error="broken" if text == "break" else None) for text in texts]
        return [Answer(methods.Question(0, one.text, []), method, one) for one in said]


def spoken(talk, model, name="shapes", **limits):
    """What comes of `talk` with an HTTP client of a server in this process."""

    async def run():
        app = create_app(model, name, Limits(**limits))
        how = {"transport": httpx2.ASGITransport(app), "base_url": "http://test", "timeout": 60}
        async with app.router.lifespan_context(app), httpx2.AsyncClient(**how) as client:
            return await talk(client)

    return asyncio.run(run())


async def ask(client, *args, **more):
    return await client.post("/v1/chat/completions", json=request(*args, **more))


# answers


@pytest.fixture(scope="module")
def shapes():
    return dmlr.load("data/models/shapes-vl", preset="demo", max_num_steps=3)


def asked(count):
    """Questions of the embedded benchmark, as many of each suite: (idx, text, image URI)."""
    for suite in SUITES:
        for example in load_dataset(ROOT / f"data/shapes/{suite}.json")[0][: count // len(SUITES)]:
            content = Path(example.images[0]).read_bytes()
            yield example.idx, example.question, f"data:image/png;base64,{base64.b64encode(content).decode()}"


async def answers_of(client, questions, method):
    """Text, prompt tokens and the field `dmlr` of each, all asked at once through OpenAI's client."""

    async def one(idx, text, image):
        answer = await client.chat.completions.create(
            **request(text, image, model=f"shapes-vl:{method}"), extra_body={"dmlr": {"idx": idx}}
        )
        return answer.choices[0].message.content, answer.usage.prompt_tokens, answer.model_extra["dmlr"]

    return await asyncio.gather(*(one(*question) for question in questions))


@pytest.mark.parametrize("method", ["vanilla", "dmlr"])
def test_answers_are_those_of_ask_many(shapes, method):
    questions = list(asked(6))

    def talk(http):
        client = openai.AsyncOpenAI(api_key="-", base_url="http://test/v1", http_client=http)
        return answers_of(client, questions, method)

    wanted = shapes.ask_many([dict(zip(("idx", "question", "image"), q, strict=True)) for q in questions], method)
    for (text, tokens, told), want in zip(spoken(talk, shapes, "shapes-vl"), wanted, strict=True):
        assert (text, tokens) == (want.text, want.prompt_tokens)
        assert told["idx"] == want.question.idx and told["prompt_tokens"] == tokens
        if method == "dmlr":
            assert told["trace"]["patches"] == want.trace.patches and len(told["trace"]["steps"]) == 3


@pytest.fixture(scope="module")
def post(shapes):
    """What the server says to a request."""
    with TestClient(create_app(shapes, "shapes-vl", Limits())) as client:
        yield lambda *args, **more: client.post("/v1/chat/completions", json=request(*args, **more)).json()


def test_without_a_number_of_its_own_a_question_has_one_answer(post):
    texts = ("Is there a star?", "Is there a star?", "Is there a ring?")
    first, again, other = (post(text, PICTURE, model="shapes-vl") for text in texts)
    assert first["dmlr"]["idx"] == again["dmlr"]["idx"] != other["dmlr"]["idx"]
    assert first["choices"] == again["choices"] and first["dmlr"]["trace"] == again["dmlr"]["trace"]
    usage = first["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and usage["prompt_tokens"] > 30


def test_max_tokens_and_what_clients_send_by_habit(post):
    habits = {"temperature": 0.0, "top_p": 1.0, "n": 1, "stream": False, "stop": None, "tools": None, "user": "me"}
    answer = post("How many?", PICTURE, model="shapes-vl:vanilla", max_tokens=2, **habits)
    assert answer["usage"]["completion_tokens"] == 2 and answer["choices"][0]["finish_reason"] == "length"


# what is refused


@pytest.fixture(scope="module")
def refusing():
    """A client of a server whose model must never be asked."""
    limits = Limits(body=200_000, pixels=56 * 56)
    with TestClient(create_app(SimpleNamespace(), "shapes", limits)) as client:
        yield client


def message(**more):
    return request() | {"messages": [{"role": "user", "content": "How many?"} | more]}


# What is not honoured, each with a value that would change the answer; the last is a misspelt name.
OTHERS = {"temperature": 0.7, "top_p": 0.9, "n": 2, "stream": True, "tools": [{}], "stop": ["\n"], "logprobs": True}
OTHERS |= {"response_format": {"type": "json_object"}, "logit_bias": {"1": 2}, "frequency_penalty": 1, "max_token": 1}
BAD = {
    "no JSON": ("{", 400, None, "Invalid JSON"),
    "a list": ("[]", 400, None, "request"),
    "not UTF-8": (b'{"model": "\xff"}', 400, None, "request"),
    "half a character": (b'{"model": "\\ud83d"}', 400, None, "Invalid JSON"),
    "no model": ({"messages": []}, 400, "model", "Field required"),
    "another model": (request(model="gpt-4o"), 404, "model", "no model 'gpt-4o'; there are shapes:vanilla, "),
    "another method": (request(model="shapes:dmrl"), 404, "model", "shapes:dmlr"),
    **{name: (request(**{name: value}), 400, name, "is not honoured here") for name, value in OTHERS.items()},
    "max_tokens 0": (request(max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
    "max_tokens beyond all bounds": (request(max_tokens=10**30), 400, "max_tokens", "less than"),
    "parameters of ours": (request(dmlr={"sigma": 1}), 400, "dmlr.sigma", "not honoured"),
    "no messages": (request(messages=[]), 400, "messages", "at least 1 item"),
    "several turns": (request(messages=request()["messages"] * 2), 400, "messages", "at most 1"),
    "a system turn": (message(role="system"), 400, "messages.0.role", "'user'"),
    "no content": (message(content=[]), 400, "messages", "the question is empty"),
    "blank text": (message(content=" \n"), 400, "messages", "the question is empty"),
    "audio": (message(content=[{"type": "input_audio"}]), 400, "messages.0.content", "input_audio"),
    "a path": (request("?", "/etc/passwd"), 400, "messages", "must begin with data:"),
    "http unasked": (request("?", "http://127.0.0.1:9/a.png"), 400, "messages", "must begin with data:"),
    "not base64": (request("?", "data:image/png;base64,!!"), 400, "messages", "base64"),
    "no image": (request("?", "data:image/png;base64,AAAA"), 400, "messages", "not an image"),
    "half an image": (request("?", PICTURE[: len(PICTURE) // 8 * 4 + 2]), 400, "messages", "cannot be read"),
    "a large image": (request("?", uri(noise_image(0, 56, 70))), 400, "messages", "pixels are more than"),
    "a large body": (request(user="x" * 200_000), 413, None, "larger than 200000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_a_typed_error(refusing, name):
    body, status, param, words = BAD[name]
    body = json.dumps(body) if isinstance(body, dict) else body
    reply = refusing.post("/v1/chat/completions", content=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error" and error["code"] and words in error["message"]
    assert (error["param"] or "").startswith(param or "") and bool(error["param"]) == bool(param)


@pytest.mark.parametrize(("verb", "path", "status"), [("GET", "/v1/chat/completions", 405), ("POST", "/v2", 404)])
def test_another_way_in_is_a_typed_error(refusing, verb, path, status):
    reply = refusing.request(verb, path)
    assert reply.status_code == status and reply.json()["error"]["type"] == "invalid_request_error"


def test_a_key_can_be_demanded():
    with TestClient(create_app(SimpleNamespace(), "shapes", Limits(), "kéy")) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "kéy".encode()}):
            reply = client.get("/v1/models", headers=headers)
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        listed = client.get("/v1/models", headers={"authorization": "Bearer kéy".encode()}).json()["data"]
    assert {"shapes:vanilla", "shapes:dmlr", "shapes:ulr"} <= {one["id"] for one in listed}


# under load


def test_what_comes_together_goes_together_and_by_kind():
    model = Scripted()
    model.gate.set()

    async def talk(client):
        kinds = [{}, {"model": "shapes:dmlr"}, {"max_tokens": 9}, {"seed": 13}, {}]
        replies = await asyncio.gather(*(ask(client, f"q{i}", **kind) for i, kind in enumerate(kinds)))
        return replies, await asyncio.gather(ask(client, "break"), ask(client, "go"))

    replies, broken = spoken(talk, model, quiet=0.3, longest=1)
    assert [reply.status_code for reply in replies] == [200, 200, 200, 400, 200]
    said = [reply.json()["choices"][0]["message"]["content"] for reply in replies if reply.status_code == 200]
    assert said == ["q0", "q1", "q2", "q4"]
    assert "bad luck" in replies[3].json()["error"]["message"]
    batches = [(sorted(questions), *kind) for questions, *kind in model.batches]
    assert (["q0", "q4"], "vanilla", {}) in batches and len(batches) == 5
    assert [reply.status_code for reply in broken] == [500, 200]
    assert broken[0].json()["error"]["type"] == "server_error"


def test_a_batch_leaves_when_it_is_full_and_when_it_waited_long_enough():
    model = Scripted()
    model.gate.set()
    began = time.monotonic()
    spoken(lambda client: asyncio.gather(*(ask(client, f"q{i}") for i in range(4))), model, quiet=5, longest=5, batch=2)
    spoken(lambda client: ask(client, "alone"), model, quiet=5, longest=0.01)
    assert time.monotonic() - began < 5
    assert [len(questions) for questions, *_ in model.batches] == [2, 2, 1]


def test_too_many_requests_and_one_that_waits_too_long():
    model = Scripted()

    async def talk(client):
        replies = await asyncio.gather(*(ask(client, f"q{i}") for i in range(5)))
        model.gate.set()
        return replies, await ask(client, "later")

    replies, later = spoken(talk, model, requests=3, seconds=1)
    assert sorted(reply.status_code for reply in replies) == [429, 429, 504, 504, 504]
    assert {reply.json()["error"]["type"] for reply in replies} == {"rate_limit_error", "server_error"}
    assert later.status_code == 200, "nobody is under way any more"


def test_who_hangs_up_costs_the_model_nothing():
    """At once: two, one who is gone when its turn comes, and one who goes in the middle of the request."""
    model, text = Scripted(), json.dumps(request("gone")).encode()

    async def hangs_up(client, body, more):
        told, events = [], iter([{"type": "http.request", "body": body, "more_body": more}])

        async def receive():
            return next(events, {"type": "http.disconnect"})

        async def send(event):
            told.append(event)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
        await client._transport.app(scope | {"http_version": "1.1", "root_path": ""}, receive, send)
        return told[0]["status"]

    def talk(client):
        asyncio.get_running_loop().call_later(0.2, model.gate.set)
        gone = (hangs_up(client, text, False), hangs_up(client, text[:20], True))
        return asyncio.gather(ask(client, "q0"), ask(client, "q1"), *gone)

    *replies, late, early = spoken(talk, model)
    assert [reply.status_code for reply in replies] == [200, 200] and late == early == 499
    assert sorted(question for questions, *_ in model.batches for question in questions) == ["q0", "q1"]


# a process of its own


@contextmanager
def serving(tmp_path, *options):
    """`dmlr serve` with the embedded model: the process and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dmlr", "serve", "data/models/shapes-vl", "--preset", "demo", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        at_once = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "100000"}  # what is freed goes back at once
        environment = os.environ | at_once | {"DMLR_API_KEY": "secret"}
        server = subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        base = f"http://127.0.0.1:{port}/v1"
        for _ in range(600):
            with suppress(httpx2.TransportError):
                assert httpx2.get(f"{base}/models").status_code == 401
                break
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield server, base
    finally:
        server.kill()


@pytest.mark.slow
def test_nothing_is_lost_and_memory_does_not_grow(tmp_path):
    """Rounds of 200 at once: of ten one is malformed, one hangs up, waiting or in the middle of its request."""
    bodies = [
        json.dumps(
            request(f"How many? {i}", uri(noise_image(i, 112, 112)), model="shapes-vl:vanilla", max_tokens=4)
            | {"dmlr": {"idx": i}}
        ).encode()
        for i in range(200)
    ]
    key = {"authorization": "Bearer secret"}

    async def one(client, i):
        if i % 10 == 7:
            url, part = client.base_url, bodies[i] if i % 20 == 7 else bodies[i][:5000]
            _, writer = await asyncio.open_connection(url.host, url.port)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer secret\r\n"
            writer.write(f"{head}Content-Length: {len(bodies[i])}\r\n\r\n".encode() + part)
            await writer.drain()
            await asyncio.sleep(0.01 * (i % 7))
            return writer.close()
        body = bodies[i][:-9] if i % 10 == 3 else bodies[i]
        reply = await client.post("chat/completions", content=body, headers=key)
        if i % 10 == 3:
            return reply.status_code
        told = reply.json()
        assert reply.status_code == 200 and told["dmlr"]["question"] == f"How many? {i}", told
        return told["choices"][0]["message"]["content"]

    async def round_of(base):
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=base, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, i) for i in range(200)))

    # A leak of the places of those who hung up would be a 429 in the second round.
    with serving(tmp_path, "--requests", "210") as (server, base):
        process, memory, rounds = psutil.Process(server.pid), [], []
        for _ in range(6):
            rounds.append(asyncio.run(round_of(base)))
            memory.append(process.memory_info().rss / 2**20)
    print("MiB after each round of 200:", *(f"{size:.0f}" for size in memory))
    assert all(answers == rounds[0] for answers in rounds) and rounds[0][3::10] == [400] * 20
    assert max(memory[2:]) - memory[1] < 40, memory
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_real_server_answers_as_a_run_does_and_ends_in_good_order(tmp_path):
    """60 questions of vanilla and dmlr through OpenAI's client; SIGTERM while three batches are under way."""
    questions = list(asked(60))
    with serving(tmp_path) as (server, base):
        client = openai.AsyncOpenAI(api_key="secret", base_url=base, max_retries=0)

        async def run():
            found = {method: await answers_of(client, questions, method) for method in ("vanilla", "dmlr")}
            last = asyncio.gather(*(answers_of(client, [question], "dmlr") for question in questions[:48]))
            await asyncio.sleep(2)  # a busy machine has read all of them by then, an idle one has not answered them
            server.send_signal(signal.SIGTERM)
            return found, [one for (one,) in await last]

        found, last = asyncio.run(run())
        assert server.wait(30) in (0, -signal.SIGTERM)
    assert [text for text, *_ in last] == [text for text, *_ in found["dmlr"][:48]]
    for suite, start in zip(SUITES, range(0, 60, 20), strict=True):
        where = {"dataset": f"data/shapes/{suite}.json", "output_dir": str(tmp_path / suite), "verbose": 0}
        results = evaluate.run(Config.make("demo", methods="vanilla,dmlr", end_data_idx=20, **where))
        for (_, method), result in results.items():
            answers = [text for text, *_ in found[method][start : start + 20]]
            assert answers == [entry["model_output"] for entry in result["entries"]]
