"""The judges' part of a record: the rules' verdict at once, an LLM's where it is wanted, over all records together.

`rule_verdict` keeps what the rules said, whoever decides in the end; from it follows what an LLM is asked about and
how often the two agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dmlr.config import Config
from dmlr.data.examples import Example
from dmlr.judge import Verdict, judge, llm_judge
from dmlr.run.records import RunLog


def verdict_of(example: Example, text: str, stop_reason: str) -> dict[str, Any]:
    """The rules' part of a record; the same rules for every method. None where nothing was to be judged."""
    if stop_reason in ("error", "skipped_no_ground_truth"):
        nothing = dict.fromkeys(("answer", "is_correct", "verdict", "rule", "rule_verdict"))
        return nothing | {"ground_truth_text": example.solution}
    verdict = judge(text, example.solution, **hints(example))
    record = fields_of(verdict) | {"ground_truth_text": example.solution, "rule_verdict": verdict.status}
    if abstention := example.meta.get("abstention"):  # what this dataset lets an answer say instead; it is not right
        record["abstained"] = judge(text, abstention).status == "correct"
    return record


def judged_again(old: Mapping[str, Any], example: Example) -> dict[str, Any]:
    """A record under today's rules and ground truth; what an LLM said about the same truth stays until it is asked."""
    new = verdict_of(example, old["model_output"], old["stop_reason"])
    if by_llm(old) and old["ground_truth"] == example.solution:
        new = {key: new[key] for key in ("rule_verdict", "ground_truth_text")}
    return {**old, **new, "ground_truth": example.solution}


def by_llm(record: Mapping[str, Any]) -> bool:
    """Whether an LLM was asked last, or failed to answer."""
    return str(record["rule"]).startswith("llm:")


def hints(example: Example) -> dict[str, Any]:
    """What a judge is told beside prediction and ground truth."""
    names = ("choices", "kind", "precision", "relative_tolerance")
    return {"question": example.question} | {key: example.meta[key] for key in names if key in example.meta}


def fields_of(verdict: Verdict) -> dict[str, Any]:
    """A verdict in a record; a judge that failed says nothing about the answer."""
    return {
        "answer": verdict.answer,
        "is_correct": None if verdict.status == "judge_failed" else verdict.status == "correct",
        "verdict": verdict.status,
        "rule": verdict.rule,
    }


def llm_settings(config: Config) -> llm_judge.JudgeSettings | None:
    """Where the LLM judge is; None when none is wanted. JudgeError when one is and cannot be asked."""
    return llm_judge.JudgeSettings.from_environment() if config.use_llm_verify else None


def ask_llm(
    log: RunLog, examples: Iterable[Example], settings: llm_judge.JudgeSettings | None, *, every: bool
) -> dict[str, Any] | None:
    """Logs an LLM's verdict on what the rules could not decide (`every`: on all of it) in place of theirs.

    What an LLM decided in an earlier run, and is not asked about in this one, is the rules' again. Returns what it
    cost and how it agrees with the rules, for results.json; None without settings. A failed call is judge_failed, which
    counts neither way and is asked again by resume and by verify_only; it never replaces an LLM's earlier verdict.
    Whatever was answered before comes from the judge's cache.
    """
    by_row = {example.row: example for example in examples}
    wanted = ("correct", "wrong", "unparsed") if every else ("unparsed",)
    judged = [record for record in log.records() if record["row"] in by_row]
    records = [record for record in judged if settings is not None and record.get("rule_verdict") in wanted]
    asked = {record["row"] for record in records}
    for old in judged:
        if old["row"] not in asked and by_llm(old):
            log.append(old | verdict_of(by_row[old["row"]], old["model_output"], old["stop_reason"]))
    if settings is None:
        return None
    cases = [
        {"prediction": r["model_output"], "ground_truth": by_row[r["row"]].solution, **hints(by_row[r["row"]])}
        for r in records
    ]
    llm = llm_judge.LLMJudge(settings, llm_judge.shared_cache())
    verdicts = []
    for record, verdict in zip(records, llm.judge_many(cases), strict=True):
        if verdict.status == "judge_failed" and by_llm(record) and record["verdict"] != "judge_failed":
            verdict = Verdict(record["verdict"], record["rule"], record["answer"])
        elif (changed := record | fields_of(verdict)) != record:
            log.append(changed)
        verdicts.append(verdict.status)
    table = llm_judge.agreement([record["rule_verdict"] for record in records], verdicts)
    return llm.report() | {"every": every, "agreement": table}
