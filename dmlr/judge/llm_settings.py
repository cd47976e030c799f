"""Which LLM judges, with whose key and at what price: from the environment or `.env`. Knows nothing about judging."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import SecretStr

DEFAULTS = {"OPENAI_API_BASE_URL": "https://api.openai.com/v1", "MODEL_TYPE": "gpt-4.1-2025-04-14"}


class JudgeError(RuntimeError):
    """Settings or a cache folder that no judging can start with; the message says what is missing, never the key."""


@dataclass(frozen=True)
class JudgeSettings:
    """Where the judge is and what it is called. The key is a SecretStr: printed, logged or dumped, it is stars.

    `price` is in US dollars per million tokens, (prompt, completion); None when nobody said it: prices change, and this
    code knows none.
    """

    base_url: str
    model: str
    key: SecretStr
    price: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.key, str):
            object.__setattr__(self, "key", SecretStr(self.key))

    @classmethod
    def from_environment(cls) -> JudgeSettings:
        """OPENAI_API_KEY, OPENAI_API_BASE_URL, MODEL_TYPE and MODEL_PRICE ("2,8": dollars per million prompt and
        completion tokens) from the environment, else from `.env` in the working folder. JudgeError when the key is
        missing, or a value cannot be one.
        """
        try:
            in_file = dotenv_values(".env") if Path(".env").is_file() else {}
        except (OSError, ValueError) as error:
            raise JudgeError(f".env cannot be read: {type(error).__name__}") from None
        found = {}
        for name in ("OPENAI_API_KEY", "MODEL_PRICE", *DEFAULTS):
            values = (os.environ.get(name), in_file.get(name), DEFAULTS.get(name))
            found[name] = next((value.strip() for value in values if value and value.strip()), "")
        key, url, model = found["OPENAI_API_KEY"], found["OPENAI_API_BASE_URL"], found["MODEL_TYPE"]
        if not key:
            raise JudgeError(
                "the LLM judge needs OPENAI_API_KEY, in the environment or in a file .env in the working folder "
                "(for a server that checks no key, any word will do)"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise JudgeError("OPENAI_API_KEY holds blanks or characters that no key has")
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # such as a port that is no number
            usable = False
        if not usable:
            raise JudgeError("OPENAI_API_BASE_URL is no http:// or https:// address")
        return cls(url, model, SecretStr(key), parse_price(found["MODEL_PRICE"]))


def parse_price(text: str) -> tuple[float, float] | None:
    """Dollars per million prompt and completion tokens from "2,8"; None from no text. JudgeError for anything else."""
    if not text:
        return None
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        prompt = completion = math.nan
    if not (0 <= prompt < math.inf and 0 <= completion < math.inf):
        raise JudgeError(
            'MODEL_PRICE is no price: expected dollars per million prompt and completion tokens, such as "2,8"'
        )
    return prompt, completion
