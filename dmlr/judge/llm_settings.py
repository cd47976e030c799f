"""Which LLM judges, with whose key and at what price: from the environment or `.env`. Knows nothing about judging."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, HttpUrl, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dmlr.config import root


class JudgeError(RuntimeError):
    """Settings or a cache folder that no judging can start with; the message says what is missing, never the key."""


def _key(key: SecretStr) -> SecretStr:
    if not all("!" <= character <= "~" for character in key.get_secret_value()):
        raise ValueError("holds blanks or characters that no key has")
    return key


def _address(url: str) -> str:
    HttpUrl(url)  # raises; the address itself stays as it was written
    return url


Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Price = Annotated[tuple[Dollars, Dollars], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)]


class JudgeSettings(BaseSettings):
    """Where the judge is and what it is called. The key is a SecretStr: printed, logged or dumped, it is stars.

    `price` is in US dollars per million tokens, (prompt, completion), "2,8" in the environment; None when nobody said
    it: prices change, and this code knows none.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True)

    key: Annotated[SecretStr, AfterValidator(_key)] = Field(validation_alias="OPENAI_API_KEY")
    base_url: Annotated[str, AfterValidator(_address)] = Field(
        "https://api.openai.com/v1", validation_alias="OPENAI_API_BASE_URL"
    )
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
