"""What a report says about the LLM judge: through a real run of the benchmark notebook, with a server on loopback."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from judge_server import JudgeServer, says
from notebook_files import defined, external_requests

from dmlr import notebooks
from dmlr.run.records import find_runs, read_results
from dmlr.stats import metrics

BENCHMARK = Path(__file__).parents[1] / "notebooks" / "03_benchmark.ipynb"
SMALL = {"end_data_idx": 4, "max_num_steps": 1, "batch_size": 4, "max_new_tokens": 48}
ATTACK = "<script>alert('judge')</script>"
COLUMNS = ("correct", "wrong", "unparsed", "judge_failed")
SECTION = defined(BENCHMARK, ["costs"], pd=pd, metrics=metrics, results={})


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("OPENAI_", "MODEL_")):
            monkeypatch.delenv(name)
    with JudgeServer() as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")
        monkeypatch.setenv("OPENAI_API_BASE_URL", server.url)
        monkeypatch.setenv("MODEL_TYPE", f"judge {ATTACK}")
        monkeypatch.setenv("JUDGE_CACHE", str(tmp_path / "cache"))
        yield server


def shown(page):
    """Of the LLM's section: rows of its first and its last table, the sentence between them; and the page's text."""
    soup = BeautifulSoup(page, "html.parser")
    assert external_requests(page) == []
    (first,), (last,) = (
        [t for t in soup("table") if t.caption and t.caption.get_text().startswith(title)]
        for title in ("The LLM judge: ", "Rules against LLM")
    )
    rows, table = ([[cell.get_text() for cell in row("td")] for row in t.find("tbody")("tr")] for t in (first, last))
    return rows, last.find_previous("p").get_text(), table, soup.get_text()


def test_the_report_shows_what_the_judge_did_and_cost_and_where_the_rules_disagree(server, monkeypatch, tmp_path):
    def behave(handler, body):
        text = body["messages"][1]["content"]
        first_seen.append(text.split("\n")[1])
        if text.split("\n")[1] == first_seen[0]:
            handler.reply(403, {"error": {"message": f"no capacity {ATTACK}"}})
        else:
            says({"answer": "x", "verdict": "wrong" if len(first_seen) % 2 else "correct"})(handler, body)

    first_seen = []
    server.behave = behave
    monkeypatch.setenv("MODEL_PRICE", "2000,8000")
    given = {**SMALL, "output_dir": str(tmp_path / "run"), "use_llm_verify": True, "llm_verify_all": True}
    report = notebooks.run(BENCHMARK, given)
    results = {path.name: read_results(path) for path in find_runs(tmp_path / "run")}
    rows, sentence, table, text = shown(report.read_text(encoding="utf-8"))
    assert [row[:4] for row in rows] == [["mathematics", m, f"judge {ATTACK}", "4"] for m in ("vanilla", "dmlr")]
    for row in rows:
        answers, cached, requests, failed, prompt, completion = map(int, row[3:9])
        answered = requests - failed
        assert cached + requests == answers == 4 and failed == 1
        assert (prompt, completion) == (100 * answered, 10 * answered)
        assert row[9] == f"${(100 * answered * 2000 + 10 * answered * 8000) / 1e6:.4f}"
    assert sum(int(row[5]) for row in rows) == len(server.requests)
    counts = Counter((e["rule_verdict"], e["verdict"]) for result in results.values() for e in result["entries"])
    assert counts.total() == 8 and sum(n for (_, llm), n in counts.items() if llm == "judge_failed") == 2
    expected = [[str(counts[rules, llm]) for llm in COLUMNS] for rules in ("correct", "wrong", "unparsed")]
    assert [row[1:] for row in table] == expected
    same = sum(n for (rules, llm), n in counts.items() if rules == llm)
    assert sentence.startswith(f"Rules and LLM give the same verdict on {same} of 6 answers: ")
    assert f"no capacity {ATTACK}" in text and "http_403" in text and "sk-very-secret" not in text


def test_without_a_price_the_table_says_so():
    agreement = {rules: {llm: int(rules == llm) for llm in COLUMNS} for rules in COLUMNS[:3]}
    asked = {"model": "m", "requests": 3, "cached": 1, "failed": 0, "prompt_tokens": 300, "completion_tokens": 30}
    asked |= {"dataset": "d", "method": "vanilla", "cost_usd": None, "failures": {}, "agreement": agreement}
    told = SECTION.costs([asked]).iloc[0].astype(str).tolist()
    assert told == ["d", "vanilla", "m", "3", "1", "3", "0", "300", "30", "price not given"]
    assert "same verdict on 3 of 3" in SECTION.agreement(pd.DataFrame(agreement).T)


def test_where_only_the_undecided_is_asked_the_sentence_says_so():
    counts = pd.DataFrame(0, index=COLUMNS[:3], columns=COLUMNS)
    counts.loc["unparsed", "judge_failed"] = 4
    assert SECTION.agreement(counts) == "No answer has a verdict of both."
    counts.loc["unparsed"] = [3, 2, 1, 4]
    assert "found 3 of 6 answers correct, 2 wrong, and no answer in 1" in SECTION.agreement(counts)
