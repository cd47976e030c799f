"""Which LLM judges, with whose key and at what price: from the environment or `.env`. Knows nothing about judging."""

from __future__ import annotations

import math
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dmlr.config import root


class JudgeError(RuntimeError):
    """Settings or a cache folder that no judging can start with; the message says what is missing, never the key."""


def _key(key: SecretStr) -> SecretStr:
    text = key.get_secret_value()
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("holds blanks or characters that no key has")
    return key


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a port that is no number
        usable = False
    if not usable:
        raise ValueError("is no http:// or https:// address")
    return url


def _price(value: Any) -> Any:
    """Dollars per million prompt and completion tokens from "2,8"."""
    if not isinstance(value, str):
        return value
    try:
        prompt, completion = (float(part) for part in value.split(","))
    except ValueError:
        prompt = completion = math.nan
    if not (0 <= prompt < math.inf and 0 <= completion < math.inf):
        raise ValueError('is no price: expected dollars per million prompt and completion tokens, such as "2,8"')
    return prompt, completion


class JudgeSettings(BaseSettings):
    """Where the judge is and what it is called. The key is a SecretStr: printed, logged or dumped, it is stars.

    `price` is in US dollars per million tokens, (prompt, completion); None when nobody said it: prices change, and this
    code knows none.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True)

    key: Annotated[SecretStr, AfterValidator(_key)] = Field(validation_alias="OPENAI_API_KEY")
    base_url: Annotated[str, AfterValidator(_address)] = Field(
        "https://api.openai.com/v1", validation_alias="OPENAI_API_BASE_URL"
    )
    model: str = Field("gpt-4.1-2025-04-14", validation_alias="MODEL_TYPE")
    price: Annotated[tuple[float, float] | None, NoDecode, BeforeValidator(_price)] = Field(
        None, validation_alias="MODEL_PRICE"
    )

    @classmethod
    def from_environment(cls) -> JudgeSettings:
        """From the environment, else from `.env` in the project's root, else from one in the working folder.

        JudgeError when the key is missing, or a value cannot be one.
        """
        try:
            return cls(_env_file=(".env", root() / ".env"))  # the later one wins
        except ValidationError as error:
            (name, *_), problem = error.errors()[0]["loc"], error.errors()[0]
        except (OSError, ValueError) as error:
            raise JudgeError(f".env cannot be read: {type(error).__name__}") from None
        if problem["type"] == "missing":
            raise JudgeError(
                f"the LLM judge needs {name}, in the environment or in a file .env in the project's root or in the "
                "working folder (for a server that checks no key, any word will do)"
            )
        raise JudgeError(f"{name} {problem['msg'].removeprefix('Value error, ')}")
