"""An LLM as judge, over any server that speaks the chat-completions protocol; asked where the rules cannot decide.

A verdict is correct, wrong or unparsed when the server gave one, and judge_failed for everything else that can happen
(no key accepted, no capacity, time-outs, a reply that is none): never wrong for the judge's own fault. Verdicts are
kept on disk by model and content, failures are not, so asking again costs nothing and mends what failed. Whose key and
which server come from the environment or `.env`; the key goes into the request's header and nowhere else. What is asked
stands in llm_prompt.py. The client takes a second to import and is imported when something is asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import diskcache
from anyio.from_thread import start_blocking_portal
from pydantic import AfterValidator, BeforeValidator, Field, HttpUrl, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dmlr.config import locate, root
from dmlr.judge import Verdict
from dmlr.judge.llm_prompt import RESPONSE_FORMAT, Reply, clean, data_message, messages, output_of, read_reply

if TYPE_CHECKING:
    import openai

STATUSES = ("correct", "wrong", "unparsed", "judge_failed")

# Ways to ask, from the one that binds the reply most to the one that every server understands.
_FORMS = ({"temperature": 0, "response_format": RESPONSE_FORMAT}, {"temperature": 0}, {})
# Reasons to ask in the next way: a parameter that the server does not know, or a reply that is no verdict.
_ASK_OTHERWISE = ("http_400", "http_404", "http_415", "http_422", "unreadable_reply")
_UNANSWERED = re.compile(r"timeout|connection|http_(?:403|408|429|5\d\d)")  # reasons that lie with the server alone
_CACHE_ERRORS = (OSError, ValueError, sqlite3.Error, zlib.error, diskcache.Timeout)
_SHOWN = 300


class JudgeError(RuntimeError):
    """Settings or a cache folder that no judging can start with; the message says what is missing, never the key."""


def _printable(key: SecretStr) -> SecretStr:
    if not all("!" <= character <= "~" for character in key.get_secret_value()):
        raise ValueError("holds blanks or characters that no key has")
    return key


Address = Annotated[str, AfterValidator(lambda url: HttpUrl(url) and url)]  # checked, and kept as it was written
Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Price = Annotated[tuple[Dollars, Dollars], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)]


class JudgeSettings(BaseSettings):
    """Where the judge is and what it is called. The key is a SecretStr: printed, logged or dumped, it is stars.

    `price` is in US dollars per million tokens, (prompt, completion), "2,8" in the environment; None when nobody said
    it: prices change, and this code knows none.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True)

    key: Annotated[SecretStr, AfterValidator(_printable)] = Field(validation_alias="OPENAI_API_KEY")
    base_url: Address = Field("https://api.openai.com/v1", validation_alias="OPENAI_API_BASE_URL")
    model: str = Field("gpt-4.1-2025-04-14", validation_alias="MODEL_TYPE")
    price: Annotated[Price | None, NoDecode] = Field(None, validation_alias="MODEL_PRICE")

    @classmethod
    def from_environment(cls) -> JudgeSettings:
        """From the environment, else from `.env` in the project's root, else from one in the working folder.

        JudgeError when the key is missing, or a value cannot be one.
        """
        try:
            return cls(_env_file=(".env", root() / ".env"))  # the later one wins
        except ValidationError as error:
            wrong = "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors(include_input=False))
        except (OSError, ValueError) as error:
            wrong = f".env: {type(error).__name__}"
        raise JudgeError(
            f"the LLM judge cannot be asked, {wrong} (OPENAI_API_KEY, any word for a server that checks none, and "
            'MODEL_PRICE, such as "2,8", are read from the environment or from .env in the project\'s root or here)'
        )


class LLMJudge:
    """Asks one model on one server. `usage` and `failures` (reason: first message) add up over all calls.

    At most `concurrency` requests are open; each is repeated up to `max_retries` times when that can help, after the
    pause that the server asks for or a growing one, and ends after (`max_retries` + 1) × `timeout` seconds.
    JudgeError when the cache folder cannot be made.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        cache_folder: str | Path,
        *,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 4,
    ) -> None:
        self.settings = settings
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "requests", "cached", "failed"), 0)
        self.failures: dict[str, str] = {}
        self._form = 0  # of _FORMS, the last that worked
        self._fruitless = 0  # calls in a row that the server did not answer
        # JSON, not pickles: a folder that others can write to must not run their code.
        plain = {"disk": diskcache.JSONDisk, "disk_compress_level": 0, "eviction_policy": "none"}
        try:
            self._cache = diskcache.Cache(str(cache_folder), **plain)
        except (OSError, sqlite3.Error) as error:
            raise JudgeError(f"{cache_folder}: cannot hold the judge's cache: {error}") from None

    def judge_many(self, cases: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Verdicts in the order of the cases (keys as of `judge.judge`).

        Raises nothing for what a server does. Once it rejects the key, or leaves 3 × `concurrency` calls in a row
        without answer, the remaining cases fail unasked. An interrupt stops at once and keeps what was answered.
        """
        asked = [data_message(case) for case in cases]
        verdicts = {data: self._known(data, case) for data, case in zip(asked, cases, strict=True)}
        if waiting := [data for data, verdict in verdicts.items() if verdict is None]:
            # A thread with an event loop of its own: notebooks already run one in this thread.
            with start_blocking_portal() as portal:
                portal.call(self._ask_all, waiting, verdicts)
        found = [verdicts[data] for data in asked]
        self.usage["failed"] += sum(verdict.status == "judge_failed" for verdict in found)
        return found

    def report(self) -> dict[str, Any]:
        """What the judging cost so far, for the run's report: usage, dollars (None: no price given), failures."""
        tokens, price = (self.usage["prompt_tokens"], self.usage["completion_tokens"]), self.settings.price
        cost = None if price is None else sum(n * dollars for n, dollars in zip(tokens, price, strict=True)) / 1e6
        return {"model": self.settings.model, **self.usage, "cost_usd": cost, "failures": dict(self.failures)}

    async def _ask_all(self, waiting: Sequence[str], verdicts: dict[str, Verdict | None]) -> None:
        import openai

        free = anyio.Semaphore(self.concurrency)
        self._fruitless = 0

        async def count(request: Any) -> None:
            self.usage["requests"] += 1

        async def ask_one(data: str) -> None:
            async with free:
                verdicts[data] = await self._ask(client, data)

        async with (
            openai.AsyncOpenAI(
                api_key=self.settings.key.get_secret_value(),
                base_url=self.settings.base_url,
                timeout=self.timeout,
                max_retries=self.max_retries,
                http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [count]}),
            ) as client,
            anyio.create_task_group() as tasks,
        ):
            for data in waiting:
                tasks.start_soon(ask_one, data)

    async def _ask(self, client: openai.AsyncOpenAI, data: str) -> Verdict:
        """One case: the ways to ask in turn, until one brings a reply that can be read."""
        if self._fruitless >= 3 * self.concurrency:
            return self._failed("not_asked", "the server left too many calls in a row without answer")
        reason = message = ""
        for form in range(self._form, len(_FORMS)):
            try:
                # The client's own time-out begins anew with every byte received.
                with anyio.fail_after(self.timeout * (self.max_retries + 1)):
                    completion = await client.chat.completions.create(
                        model=self.settings.model, messages=messages(data), **_FORMS[form]
                    )
                reply = read_reply(self._content(completion))
            except Exception as error:  # whatever it is, it is not the fault of the output that is judged
                reason, message = _reason(error)
                if reason not in _ASK_OTHERWISE:
                    break
            else:
                self._fruitless, self._form = 0, form
                reply.answer = self._shown(reply.answer)
                await anyio.to_thread.run_sync(self._keep, data, reply)
                return self._verdict(reply)
        self._fruitless = self._fruitless + 1 if _UNANSWERED.fullmatch(reason) else 0
        if reason == "http_401":
            self._fruitless = 3 * self.concurrency
        return self._failed(reason, message)

    def _content(self, completion: Any) -> str:
        """Text of a completion, its tokens counted. ValueError for what is none: the client checks no types."""
        try:
            for name in ("prompt_tokens", "completion_tokens"):
                self.usage[name] += int(getattr(completion.usage, name, None) or 0)
            return "" + completion.choices[0].message.content
        except (AttributeError, IndexError, TypeError, KeyError):
            raise ValueError("the server's reply is no chat completion with text") from None

    def _verdict(self, reply: Reply) -> Verdict:
        status = "unparsed" if reply.verdict == "no_answer" else reply.verdict
        return Verdict(status, f"llm:{self.settings.model}", reply.answer)

    def _failed(self, reason: str, message: str) -> Verdict:
        self.failures.setdefault(reason, self._shown(message))
        return Verdict("judge_failed", f"llm:{self.settings.model}:{reason}", "")

    def _shown(self, text: str) -> str:
        """Text from outside as it may be written down: servers quote the key that they reject."""
        text = " ".join(clean(text).replace(self.settings.key.get_secret_value(), "[key]").split())
        return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"

    # the cache: processes can share the folder without knowing of each other

    def _key(self, data: str) -> str:
        # A model's name means something on its own server only.
        question = json.dumps([self.settings.base_url, self.settings.model, messages(data)])
        return hashlib.sha256(question.encode()).hexdigest()

    def _known(self, data: str, case: Mapping[str, Any]) -> Verdict | None:
        """The verdict of the cache, or the rules' where there is nothing to compare; None where it must be asked."""
        if not clean(case.get("ground_truth")).strip():
            return Verdict("unparsed", "no_ground_truth", "")
        if not output_of(case):
            return Verdict("unparsed", "no_answer", "")
        try:
            reply = Reply.model_validate(self._cache[self._key(data)])
        except (KeyError, *_CACHE_ERRORS):  # not there, or damaged: it is asked again
            return None
        self.usage["cached"] += 1
        return self._verdict(reply)

    def _keep(self, data: str, reply: Reply) -> None:
        try:
            self._cache[self._key(data)] = reply.model_dump()
        except _CACHE_ERRORS as error:
            warnings.warn(f"{self._cache.directory}: LLM verdicts are not kept: {error}", stacklevel=2)


def _reason(error: Exception) -> tuple[str, str]:
    """Why there is no verdict, as one word and as a message."""
    import openai

    match error:
        case openai.APIStatusError():
            return f"http_{error.status_code}", error.message
        case openai.APITimeoutError() | TimeoutError():
            return "timeout", "no whole reply in time"
        case openai.APIConnectionError():
            return "connection", f"{type(error.__cause__).__name__}: {error.__cause__}"
        case ValueError():  # no JSON, another protocol, or no verdict
            return "unreadable_reply", str(error)
    return type(error).__name__, str(error)


def judge_cases(
    cases: Sequence[Mapping[str, Any]], by_rules: Iterable[Verdict], *, always: bool = False
) -> list[Verdict]:
    """The rules' verdicts, the LLM's in place of those that are unparsed, or of all of them: for the command line.

    Settings from the environment, the shared cache; cost and agreement go to stderr. JudgeError before any case is
    judged when the settings or the cache cannot be used.
    """
    llm = LLMJudge(JudgeSettings.from_environment(), shared_cache())
    by_rules = list(by_rules)
    asked = [i for i, verdict in enumerate(by_rules) if always or verdict.status == "unparsed"]
    verdicts = dict(enumerate(by_rules)) | dict(zip(asked, llm.judge_many([cases[i] for i in asked]), strict=True))
    print(json.dumps(llm.report()), file=sys.stderr)
    if always:
        table = agreement([v.status for v in by_rules], [v.status for v in verdicts.values()])
        print(json.dumps({"rules, then llm": table}), file=sys.stderr)
    return list(verdicts.values())


def agreement(by_rules: Sequence[str], by_llm: Sequence[str]) -> dict[str, dict[str, int]]:
    """Counts of cases by status, the rules' first and then the LLM's; every pair of STATUSES is there, if with 0."""
    counts = Counter(zip(by_rules, by_llm, strict=True))
    return {rules: {llm: counts[rules, llm] for llm in STATUSES} for rules in STATUSES if rules != "judge_failed"}


def shared_cache() -> Path:
    """The cache that runs share: the folder JUDGE_CACHE of the environment, else one beside this checkout's runs."""
    return Path(os.environ.get("JUDGE_CACHE") or Path(locate("reports")) / "runs" / "judge_cache")
