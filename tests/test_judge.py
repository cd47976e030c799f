"""The judge against cases of its own, against the shared cases when they are at hand, and against anything at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pebble import ProcessExpired

from dmlr.cli import main
from dmlr.judge import judge, mathcheck

SHARED = Path(__file__).resolve().parents[2] / "shared" / "judge" / "cases.json"
# Entries whose label our own reading finds false, by position: why.
MISLABELLED = {66: "identical strings are labelled different (a pass@k fixture whose other samples decide)"}

COLOURS = {"question": "Which colour?\nA. red\nB. dark red\nC. blue\nD. green"}
TWICE = {"question": "Example:\nA. x\nB. y\n\nQuestion:\nA. 1\nB. 2\nC. 3"}
WINGS = {"question": "Are the wings open or closed?\\n Options: (a) Open (b) Closed"}
YES_NO = {"question": "Is there a dog?\nOptions: (a) Yes (b) No"}
HELLO, CAT, STOP = (
    {"question": question}
    for question in ('Is the word in this image "Hello"?', "Is there a cat on the table?", 'Is the "STOP" sign red?')
)
HALVES = {"choices": ["$2$", r"$\frac{1}{2}$"]}
PERCENT = {"relative_tolerance": 0.01}


def status(prediction, truth, **hints):
    return judge(prediction, truth, **hints).status


# Ground truth, hints, and predictions that are correct, wrong and unparsed for it; "|" stands between them.
CASES = [
    # yes and no
    (r"\boxed{Yes}", {}, "yes|Yes, the dog is there.|Oui|是的|I think yes.", "No, there is none.|Nein|so no.", ""),
    (r"\boxed{No}", {}, r"\boxed{\text{No}}", "", "There is no dog.|I would not say yes|yes and no"),
    ("(b) No", YES_NO, "No, it is not.", "Yes, it is.", ""),
    # a sentence that repeats the question answers it
    ("Yes", {}, "Yes, or so.", "", "yes or no"),
    ("Yes", HELLO, "The word in this image is 'Hello'.|It says \"Hello\".", "It says 'Help'.", "The sign is old."),
    ("No", HELLO, "The word in this image is not 'Hello'.", "", "There is a word.|The word 'Hello' may be there."),
    ("Yes", CAT, "A cat is on the table.", "There isn't a cat on the table.", "A table is on the cat.|There is a dog."),
    ("No", CAT, "There is no cat on the table.", "There is a cat on the table.", "There is no dog on the table."),
    ("Yes", STOP, 'The "STOP" sign is red.', 'The "STOP" sign isn\'t red.', 'The "STOP" sign is blue.'),
    # numbers
    ("12", {}, r"\boxed{12}|There are 5 and 7 of them, so 5 + 7 = 12.", "2|112", "The answer is 5 or 12.|At (1, 12)"),
    (r"\boxed{7}", {}, "7", r"17|\boxed{17}", ""),
    ("3.14159", {"precision": 2}, "3.14", "3.15", ""),
    ("-0.125", {"precision": 2}, "-0.12|-0.13", "-0.14|0.12", ""),
    ("1234", {}, "1,234", "1.234", ""),
    ("-5", {}, "−5|The result is – 5|x = – 5|it is minus five|– five", "5|five", ""),
    ("52", {}, "range 10-52|so x - 52|8 cm - 52 cm|There are\n- 4\n- 52", "", ""),
    ("3", {}, "3 apples", "3x", ""),
    ("5 centimeters", {}, "5 cm|5 centimetres", "5 m", ""),
    ("100", {}, "10²|The area is 10² of it|It is 10^2, as said", "102|The area is 10", ""),
    ("0.5", {}, r"half|\boxed{one half}|It is \frac{1}{2} of it", "-half|It is -\\frac12 of it", "half of them"),
    ("1/2", {}, "half", "minus half", ""),
    ("20", {}, "It does not stop for 20 minutes", "It does not stop for 30 minutes", "It does not take 20 minutes"),
    ("0.335", {}, r"33.5\%", "33.5", ""),
    ("1234.56", {}, "1.234,56 €|USD 1,234.56", "1.23456", ""),
    ("3.5", {}, "La réponse est 3,5|3 1/2|3½", "35", ""),
    ("15000", {}, "15 thousand", "15", ""),
    ("3", {}, "There are three dogs.|It is 3.", "With $x=3$ there are 12 of them.", "two or three|I do not know"),
    ("25", {}, "25 cm^2|25 V", "2 cm^5", ""),
    (r"\frac{1}{3}", {}, r"0.\overline{3}", "0.3", ""),
    (r"\frac{1}{3}", {}, "0.333333", "0.333|0", ""),
    (r"66\frac{2}{3}\%", {}, r"\frac23", "66%", ""),
    (r"\frac{5}{2}", {"kind": "math"}, r"2 1/2|It is 2\frac{1}{2} of it", r"21/2|2\frac{1}{3}", ""),
    ("3 a^{2} b", {}, "3a^2b", "3", ""),
    ("42", {}, "42nd|42^{\\circ}C", "43rd", ""),
    ("30", {}, r"\boxed{\text{The area is } 30}", r"\boxed{\text{The area is } 20}", ""),
    ("10", {}, "So $x+1=4$, hence the result is\n\\[ 10\\text{ cm} \\]", "", ""),
    ("6", {}, "Not 5, it is 6.|So there are 6 cups, not 5.|It isn't 5 but 6 cups.", "", "The answer is not 5 or 6."),
    ("5", {}, "", "It is not 5, it is 6.|So there are 6 cups, not 5.", "It is not 5.|I don't think it's 5."),
    ("5", {}, "", "", "I would not say x=5"),
    ("2", {}, "It is 2^1, or so.", "", "不是2^{2025}"),
    # what denies a number, explains it or counts items is no answer
    ("12", {}, "It is 12 since there are 8 of them.", "The answer is 7 because 3 + 9 = 12.", "Up to:\n12. y"),
    ("12", {}, "The answer is $12$, not $5$.", "", "It is more than 12.|It is impossible to give the 12 points."),
    ("0.75", {}, "0.75 or 75%", "", "0.75 or 7.5%"),
    # a tolerance in shares of the truth, for numbers alone
    ("3.14159", PERCENT, "3.17", "3.18", ""),
    ("100", PERCENT, "99", "-100|98.9", ""),
    ("0.001", PERCENT, "", "0", ""),
    (r"\boxed{\sqrt{3}}", PERCENT, r"\boxed{1.73}", r"\boxed{1.7}", ""),
    (r"\boxed{\sqrt{3}}", {}, "", r"\boxed{1.73}", ""),
    ("1.73", PERCENT, r"\boxed{\sqrt{3}}", "", ""),
    (r"\boxed{x+1}", PERCENT, "", r"\boxed{x+1.001}", ""),
    ("[3, 7]", PERCENT, r"\boxed{3.01, 7}", r"\boxed{7, 3.01}", ""),
    (r"\boxed{30^{\circ}, \frac{9\sqrt{3}}{2}}", PERCENT, r"\boxed{30, 7.79}", r"\boxed{7.79, 30}|\boxed{30, 7}", ""),
    ("A. 100", {"choices": ["100", "100.5"], **PERCENT}, "", "B|100.5", ""),
    ("3.14159", {"relative_tolerance": "wide"}, "", "3.17", ""),
    (r"2^{2025}", PERCENT, "2^2025", "15000|x=2", ""),  # beyond floats
    # thousands that an algebra system would multiply: 15 * 000
    ("0", PERCENT, "", "[+15 000]", ""),
    ("1 000 000", {"kind": "math"}, "[1 000 000]", "[15 000]|[+15 000]", ""),
    # LaTeX
    (r"2\sqrt{3}", {}, "2√3", "", ""),
    (r"\frac{\pi}{2}", {}, "pi/2", "", ""),
    ("1+x^2", {}, "x**2+1|x ** 2 + 1|**x^2 + 1**", "x*2 + 1", ""),
    ("300", {}, "The speed is 3 × 10² m/s|3 x 10^2|3*10^2|**3 \\times 10^2**", "", ""),
    (r"(-\infty, 2]", {}, "x ≤ 2", "x < 2", ""),
    ("x=2", {}, "so x = 2", "so x != 2", ""),
    ("10_3", {}, "10_{3}", "10_2", ""),
    ("(1,-2)", {}, "The point is (1, -2).", "(-2, 1)", ""),
    (r"\boxed{0.75}", {}, r"\boxed{\frac{3}{4}}", "", ""),
    ("x^2-4", {}, "(x+2)(x-2)", "", ""),
    (r"\sqrt{8}", {}, r"2\sqrt{2}", r"\sqrt 2", ""),
    (r"\boxed{90^\circ}", {}, "90°", "", ""),
    ("2,3", {}, "2 or 3", "", ""),
    (r"\{2, 5\}", {}, "We find $2$ and $5$.", "", ""),
    (r"\text{Even}", {}, r"Thus it is \(\text{Even}\).", "", ""),
    ("thorn", {"kind": "math"}, "", "north", ""),
    ("2 = y", {}, "so y=2|y=2|The answer is y=2", "so z = 2|so y=3", ""),
    ("5=x+y", {}, "so x+y=5", "", ""),
    ("y=2+3x", {}, "The line is y = 3x + 2, which is steep.", "we get y = 2x + 3", ""),
    ("x^2", {}, "so f(x) = x^2", "", ""),
    # one side may name what it is worth
    (r"2\sqrt{5}", {}, r"BC = 2\sqrt{5}|so A \cap B = 2\sqrt{5}", r"BC = 2\sqrt{3}", ""),
    ("(3,4)", {}, "P(3, 4)", "P(4, 3)", ""),
    ("x=2 or x=3", {}, "x_1 = 2, x_2 = 3|2 或 3", "x_1 = 2, x_2 = -3", ""),
    ("x=1, y=2", {}, r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.", r"\begin{cases}x=2\\y=1\end{cases}", ""),
    (r"(2,\infty)", {}, r"\{x \mid x > 2\}", r"\{x \mid x \ge 2\}", ""),
    ("$(1,2)\\cup(3,4)$", {}, "$1<x<2$ or $3<x<4$", r"1<x\le 2 or 3<x<4", ""),
    ("B", {"kind": "math"}, r"\textbf{(B)}\ 12", r"\textbf{(C)}\ 12", ""),
    ("3:4", {"kind": "math"}, "The ratio is 3:4.|3∶4|6:8", "4:3", ""),
    ("1:2:3", {"kind": "math"}, "1 : 2 : 3", "1:3:2", ""),
    (r"\angle A \perp BC", {}, "∠A ⊥ BC", "", "∠A ∥ BC"),
    (r"25\pi", {}, "The area is 25π cm².", "The area is 24π cm².", ""),
    (r"\text{increasing}", {"kind": "math"}, "The function is increasing.", "It is not increasing", ""),
    # lists
    ("[2007, 2008]", {}, "[2007, 2008]|between 2007 and 2008|2007 and 2008", "[2008, 2007]", ""),
    ("['3', '1,200']", {}, r"\boxed{3, 1200}|['3', '1,200']|3 and 1,200", r"\boxed{1200, 3}", ""),
    ("[3, 1000, 2.5, -0.5, 1000, 4]", {}, "H2O: 3 of 1,000 cost $2.50, -½ or 1e3; x-4", "", ""),
    ("['a', 'b']", {}, '["a", "b"]|a, b', "b, a", ""),
    # options
    ("A", COLOURS, "red", "dark red", "A cat is on the mat."),
    ("B", COLOURS, "The shape is dark red.|It is not A, so I say B", "B. green|red", "It is not dark red.|At $B$."),
    ("B. dark red", COLOURS, "dark red|B|(b)", "A. dark red", ""),
    (r"\boxed{B}", COLOURS, r"dark red|\boxed{B}|The answer is (B) dark red.", "", ""),
    ("b", COLOURS, "dark red|(b)|B. dark red", "", ""),
    ("B", COLOURS, "Red is no dark red, so it is dark red.|B because A is bad", "Dark red is not it, so red", ""),
    ("C", COLOURS, "A cat is on the mat, so it must be C.", "either C or D", "It is not A, B or C."),
    ("B", COLOURS, "B\n\nExplanation: A is bad, C is bad.|B is the best of A, B, C, D", "", ""),
    ("D", {}, "The answer is surely D, it can't be A or B", "It is C or D", ""),
    ("(a) Open", WINGS, "open", "The wings are closed.", ""),
    ("A", TWICE, "1", "2", "x"),
    ("blue", {"choices": {"a": "red", "B": 7, "C": "blue"}}, "C", "B", ""),
    ("A", {"choices": ["6", "16"]}, "6", "16", ""),
    ("B", {"choices": ["3/11", "8/11"]}, r"\boxed{\frac{8}{11}}", "", ""),
    ("(a) Happy Easter", {"choices": ["Happy Easter", "Happy Easter!"]}, "Happy Easter", "Happy Easter!", ""),
    # the numbers in a formula are not the options that read like them
    ("B", HALVES, r"\boxed{\dfrac{1}{2}}|So it is $\dfrac{1}{2}$.", "So we get $x = 2$ here.", ""),
    ("A", HALVES, "So we get $x = 2$ here.", r"\boxed{\dfrac{1}{2}}", r"So it is \frac { 1 }{ 3 } of it."),
    ("A", {"choices": ["2", "5"]}, "2", r"\boxed{2 + 3}|\boxed{x = 5}", r"\boxed{\dfrac{1}{2} \text{ of it}}"),
    ("B", {"choices": ["80", "90"]}, r"The angle is $90^\circ$.", "", ""),
    ("B", {"choices": ["4%", "5%"]}, r"The share is 5\% of it.", "", ""),
    ("B", {"choices": ["$4", "$5"]}, r"It costs \$5 or so.", "", ""),
    # free text
    ("Paris", {}, "The capital is Paris.|paris.", "London", "The capital is not Paris.|I think of the city of Paris"),
    ("red, blue", {}, "red and blue", "", ""),
    ("left", {}, "The dog is on the left.|It is not right, it is left.", "", "The dog is not on the left."),
    ("ice cream", {}, "Ice-cream", "icecream", ""),
    ("U.S.", {"kind": "text"}, "US", "U.K.", ""),
    # where the answer stands
    ("42", {}, r"\boxed{41}? No, \boxed{42}|<think>41</think><answer>42</answer>|**Answer:** 42|答案是42。", "", ""),
    ("42", {}, "", r"\boxed{42}? No, \boxed{41}|\boxed{42} and \boxed{43}", r"<think>perhaps 42|\boxed{42"),
    (r"\boxed{blue}", {}, r"\boxed{\boxed{blue}}", "", ""),
    ("x_{1}^{2}", {}, r"\boxed{\frac{1}{2}} then \boxed{x_{1}^{2}} and \boxed{2", "", ""),
    (r"\{1, 2\}", {}, r"\boxed{\{1, 2\}}|\boxed{1} and $\boxed{2}$", r"\boxed{1} and $\boxed{2}$, but \boxed{3}", ""),
    ("5", {}, r"The answer is 3. Hence \boxed{4}. Final answer: 5", r"The answer is 5. Hence \boxed{4}.", ""),
    ("B", COLOURS, "A? <(begin_of_box)>B<(end_of_box)>|<(channel)>final<(message)>B<(return)>", "", ""),
]


@pytest.mark.parametrize(("truth", "hints", "correct", "wrong", "unparsed"), CASES, ids=lambda value: str(value)[:20])
def test_verdicts(truth, hints, correct, wrong, unparsed):
    for expected, predictions in (("correct", correct), ("wrong", wrong), ("unparsed", unparsed)):
        for prediction in filter(None, predictions.split("|")):
            prediction = prediction.replace("<(", "<|").replace(")>", "|>")
            assert status(prediction, truth, **hints) == expected, prediction


def test_nothing_to_compare_is_unparsed():
    assert [status(*case) for case in [("", "4"), (None, "4"), ("4", ""), ("4", None)]] == ["unparsed"] * 4


def test_a_verdict_says_which_rule_decided_and_on_what_and_hints_may_be_nonsense():
    verdict = judge("So the answer is (C).", "C. blue", **COLOURS)
    assert (verdict.status, verdict.rule, verdict.answer) == ("correct", "choice:anchor", "C")
    assert status("4", 4, precision="none", kind=3, choices=7) == "correct"


@pytest.mark.skipif(not SHARED.exists(), reason="the shared cases are not part of the repository")
def test_agreement_with_the_shared_cases():
    cases = json.loads(SHARED.read_text(encoding="utf-8"))
    wrong, false_correct = [], []
    for position, case in enumerate(cases):
        hints = {key: case.get(key) for key in ("choices", "kind", "precision", "question")}
        right = status(case["prediction"], case["ground_truth"], **hints) == "correct"
        if position not in MISLABELLED and right != case["expected_equal"]:
            (false_correct if right else wrong).append(position)
    assert not false_correct
    assert len(wrong) <= 0.01 * len(cases), wrong


def test_the_command_prints_one_verdict_a_line(tmp_path, capsys):
    path = tmp_path / "cases.json"
    cases = [{"prediction": "7", "ground_truth": "17"}, {"prediction": "\\boxed{\ud83d}", "ground_truth": "Paris"}]
    path.write_text(json.dumps(cases))  # \ud83d is half a character
    assert main(["judge", str(path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["status"], line["answer"]) for line in lines] == [("wrong", "7"), ("wrong", "?")]
    path.write_text('{"prediction": "7"}')
    assert main(["judge", str(path)]) == main(["judge", str(tmp_path / "none.json")]) == 2


# ------------------------------------------------------------------------ one answer, said in many ways

SENTENCES = "the result is {}|So x = {}.|**{}**|we get {}, as we should|it's {}|结果是{}|At 3, f(3) is {}.".split("|")
SIGNS = ("-{}", "−{}", "–{}", "-${}", "minus {}", "- {}", "– {}")
NUMBERS = ("{}", "\\boxed{{{}}}", "{} units", "\\${}", "USD {}", "{}.00")
MARKS = (" ", "\\,", "\\!", ",\\!", ",\\! ", "{,}", "\\ ", "\u00a0", "\u202f", "'", "_", "~", ",")
ENDS = ("4 + 4 = 8, then 8 * 2 = 16.", "So $x = 16$", "\\boxed{16}", "<s>The answer is 16.")
MARKERS = "<|im_end|> <|im_start|>user <|eot_id|> </s> <eos> <end_of_turn> [/INST] <|im_start|>user\\boxed{7} \nUser:7"
DENIALS = """B不是 A|是B而不是A|选B不选A|B，A不对|Bであり、Aではない
정답은 B입니다. A가 아닙니다.|B nicht A|nicht A, sondern B|C'est B, pas A|B et non A
B y no A|no es A, es B|È B, non A|не A, а B|B, niet A|B, değil A
الجواب هو B وليس A|B, not A|not A but B|A is wrong, B is right
A is not correct; B is.|It can't be A, so B|B rather than A|B, since A is false
I would rule out A. So B.|The answer is not A but B"""
SAID = {
    "signs": ([sentence.format(sign.format(52)) for sentence in SENTENCES for sign in SIGNS], "-52", "52"),
    "signs after words": ([f"from 7 down to {sign.format(52)}" for sign in SIGNS[:-2]], "-52", "52"),
    "thousands": ([n.format("1,234,567".replace(",", mark)) for n in NUMBERS for mark in MARKS], "1234567", "1234"),
    "what a chat goes on with": ([end + marker for end in ENDS for marker in MARKERS.split(" ")], "16", "7"),
    "an option that is denied in any language": (re.split(r"[|\n]", DENIALS), "B", "A"),
}


@pytest.mark.parametrize(("predictions", "right", "wrong"), SAID.values(), ids=SAID)
def test_one_answer_can_be_said_in_many_ways(predictions, right, wrong):
    for prediction in predictions:
        for hints in ({}, COLOURS):
            found = status(prediction, right, **hints), status(prediction, wrong, **hints)
            assert found == ("correct", "wrong"), prediction


@pytest.mark.parametrize("layout", ["{}. {}", "({}) {}", "{}) {}", "{}: {}"])
def test_options_in_any_layout_are_found_and_told_apart(layout):
    options = {"A": "red wine", "B": "both (a) and (b)", "C": "a drop"}
    lines = [layout.format(*option) for option in options.items()]
    question = "Which one?\n" + "\n\n".join(lines)
    for line, (letter, text) in zip(lines, options.items(), strict=True):
        for prediction in (f"\\boxed{{{letter}}}", f"The answer is {letter}.", line, f"\\boxed{{{text}}}"):
            found = [status(prediction, truth, question=question, kind="choice") for truth in lines]
            assert found == ["correct" if truth == line else "wrong" for truth in lines], prediction


# ------------------------------------------------------------------------------------ anything at all

TOKENS = "\\boxed{ } { $ answer is \\frac{ ^ _ ( ) [ ] , and or A B 1 12 \\text{ <answer> <think> not % =".split()


@given(
    st.text(max_size=60) | st.lists(st.sampled_from(TOKENS), max_size=25).map(" ".join),
    st.text(max_size=30) | st.sampled_from(["12", "B. red", "\\frac12", "Yes"]),
    st.text(max_size=40),
)
@settings(max_examples=50, deadline=None)
def test_any_text_gets_a_verdict(prediction, truth, question):
    assert status(prediction, truth, question=question) in ("correct", "wrong", "unparsed")


LONG = ["{", "\\boxed{", "\\frac{", "1,", " ", "answer is ", "1 and ", "(,", "$", "\\(", "**", "`", "not A ", "1"]


def test_a_megabyte_of_anything_returns_at_once():
    start = time.process_time()
    for unit in LONG:
        text = unit * (2**20 // len(unit))
        for truth in ("12", "B. red", "\\frac{1}{2}", "[1, 2]"):
            assert status(text, truth) in ("wrong", "unparsed")
        assert status("12", text) in ("wrong", "unparsed")
    assert time.process_time() - start < 20


def test_a_computation_without_end_is_cut_off_and_the_next_answer_comes(monkeypatch):
    monkeypatch.setattr(mathcheck, "TIMEOUT_S", 2.0)
    assert status("\\boxed{9^{9^{9^{9}}}}", "\\frac{1}{7}") == "unparsed"
    assert status("\\boxed{\\frac{2}{14}}", "\\frac{1}{7}") == "correct"


def test_every_worker_hashes_alike():
    """In which order an algebra system goes through a set, and so what it finds in time, is the same for all."""
    hashes = set()
    for _ in range(2):
        mathcheck.equal.cache_clear()
        assert mathcheck.equal("1/2", "2/4")
        hashes.add(mathcheck._pool.schedule(hash, ("a word",)).result())
        with pytest.raises(ProcessExpired):
            mathcheck._pool.schedule(os._exit, (1,)).result()
    assert len(hashes) == 1


def test_a_process_that_has_judged_ends():
    child = multiprocessing.get_context("spawn").Process(target=mathcheck.equal, args=("1/2", "2/4"))
    child.start()
    child.join(60)
    ended = child.exitcode
    child.kill()
    assert ended == 0


def test_threads_may_judge_at_once():
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: status(f"\\boxed{{\\frac{{{i}}}{{3}}}}", f"\\frac{{{2 * i}}}{{6}}"), range(1, 17))
    assert list(found) == ["correct"] * 16
