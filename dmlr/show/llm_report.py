"""What an LLM judge did in a run, as HTML for its report: asked, cost, failures, and how often the rules agree.

Reads `llm_judge` of results.json, as verdicts.ask_llm leaves it. Nothing is shown when no LLM was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from dmlr.show.page import table
from dmlr.stats.metrics import wilson

_WORDS = {"correct": "correct", "wrong": "wrong", "unparsed": "no answer", "judge_failed": "call failed"}


def llm_report(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The section for the results of a run, by (dataset, method); "" when no LLM judged."""
    used = [
        {"dataset": dataset, "method": method, **result["llm_judge"]}
        for (dataset, method), result in results.items()
        if result.get("llm_judge")
    ]
    if not used:
        return ""
    parts = ["<h3>The LLM judge</h3>", table(costs(used), "Tokens and dollars of this pass; the cache costs none.")]
    failures = [
        {"dataset": asked["dataset"], "method": asked["method"], "failure": kind, "message": message}
        for asked in used
        for kind, message in asked["failures"].items()
    ]
    if failures:
        caption = "Why calls failed: first message of each kind. A failed call is no verdict."
        parts.append(table(pd.DataFrame(failures), caption))
    counts = sum(pd.DataFrame(asked["agreement"]).T for asked in used)
    shown = counts.rename(index=_WORDS, columns=lambda llm: f"LLM: {_WORDS[llm]}").rename_axis("rules").reset_index()
    parts += ["<h3>Rules against LLM</h3>", f"<p>{agreement_in_words(counts)}</p>", table(shown)]
    return "\n".join(parts)


def costs(used: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per dataset and method: what was put to the judge, where the verdicts came from, what they cost."""
    frame = pd.DataFrame(used).rename(columns={"model": "judge", "cached": "from the cache"})
    frame = frame.rename(columns=lambda name: name.replace("_tokens", " tokens"))
    frame["answers"] = [sum(sum(row.values()) for row in asked["agreement"].values()) for asked in used]
    dollars = [asked["cost_usd"] for asked in used]
    frame["cost"] = ["price not given" if cost is None else f"${cost:.4f}" for cost in dollars]
    first = ["dataset", "method", "judge", "answers", "from the cache", "requests", "failed"]
    return frame[[*first, "prompt tokens", "completion tokens", "cost"]]


def agreement_in_words(counts: pd.DataFrame) -> str:
    """A sentence: how often both said the same, where both were asked; else what the LLM made of the undecided.

    `counts` of answers: a row for each status by the rules, a column for each by the LLM.
    """
    both = counts.drop(columns="judge_failed")
    total = int(both.to_numpy().sum())
    if not total:
        return "No answer has a verdict of both."
    if both.drop(index="unparsed").to_numpy().any():
        same = wilson(sum(int(both.loc[status, status]) for status in both.index), total)
        return f"Rules and LLM give the same verdict on {same.correct} of {total} answers: {same}."
    right, wrong, none = both.loc["unparsed", ["correct", "wrong", "unparsed"]]
    return (
        f"Only what the rules could not decide was asked: the LLM found {right} of {total} answers correct, "
        f"{wrong} wrong, and no answer in {none}."
    )
