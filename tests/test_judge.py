"""The judge against cases of its own, against the shared cases when they are at hand, and against anything at all."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlr.cli import main
from dmlr.judge import judge, mathcheck
from dmlr.judge.extract import boxed_groups, candidates, last_boxed, normalize_text, parse_options, split_choice
from dmlr.judge.quantities import find_numbers, parse_number

SHARED = Path(__file__).resolve().parents[2] / "shared" / "judge" / "cases.json"
# Entries whose label our own reading finds false, by position: why.
MISLABELLED = {66: "identical strings are labelled different (a pass@k fixture whose other samples decide)"}

COLOURS = "Which colour?\nA. red\nB. dark red\nC. blue\nD. green"
WINGS = "Are the wings open or closed?\\n Options: (a) Open (b) Closed"
YES_NO = "Is there a dog?\nOptions: (a) Yes (b) No"


def status(prediction, truth, **hints):
    return judge(prediction, truth, **hints).status


@pytest.mark.parametrize("truth", ["B. dark red", "B: dark red", "(b) dark red", "B) dark red", "\\boxed{B}", "B", "b"])
@pytest.mark.parametrize(
    "prediction", ["\\boxed{B}", "b", "(b)", "dark red", "B. dark red", "The answer is (B) dark red."]
)
def test_every_form_of_a_choice_accepts_letter_text_and_both(truth, prediction):
    assert status(prediction, truth, question=COLOURS) == "correct"


@pytest.mark.parametrize(
    ("prediction", "truth", "hints", "expected"),
    [
        # yes and no
        ("yes", "\\boxed{Yes}", {}, "correct"),
        ("Yes, the dog is there.", "\\boxed{Yes}", {}, "correct"),
        ("\\boxed{\\text{No}}", "\\boxed{No}", {}, "correct"),
        ("No, there is none.", "\\boxed{Yes}", {}, "wrong"),
        ("There is no dog.", "\\boxed{No}", {}, "unparsed"),  # a sentence about dogs answers nothing by itself
        ("No, it is not.", "(b) No", {"question": YES_NO}, "correct"),
        ("Yes, it is.", "(b) No", {"question": YES_NO}, "wrong"),
        # numbers
        ("7", "17", {}, "wrong"),
        ("17", "7", {}, "wrong"),
        ("\\boxed{17}", "\\boxed{7}", {}, "wrong"),
        ("\\boxed{12}", "12", {}, "correct"),
        ("12", "\\boxed{12}", {}, "correct"),
        ("There are 5 and 7 of them, so 5 + 7 = 12.", "12", {}, "correct"),
        ("The answer is 5 or 12.", "12", {}, "unparsed"),
        ("The points are (1, 12)", "12", {}, "unparsed"),
        ("3.14", "3.14159", {"precision": 2}, "correct"),
        ("3.15", "3.14159", {"precision": 2}, "wrong"),
        ("3.14", "3.14159", {}, "wrong"),
        ("1,234", "1234", {}, "correct"),
        ("−5", "-5", {}, "correct"),
        ("5", "-5", {}, "wrong"),
        ("5 cm", "5 centimeters", {}, "correct"),
        ("5 cm", "5 m", {}, "wrong"),
        ("10²", "102", {}, "wrong"),
        ("33.5\\%", "0.335", {}, "correct"),
        ("I do not know", "42", {}, "unparsed"),
        # a tolerance in shares of the truth, for numbers alone
        ("3.17", "3.14159", {"relative_tolerance": 0.01}, "correct"),
        ("3.18", "3.14159", {"relative_tolerance": 0.01}, "wrong"),
        ("3.17", "3.14159", {}, "wrong"),
        ("99", "100", {"relative_tolerance": 0.01}, "correct"),  # of the truth: exactly a hundredth
        ("100", "99", {"relative_tolerance": 0.01}, "wrong"),  # and a little more than that
        ("0", "0.001", {"relative_tolerance": 0.01}, "wrong"),
        ("-100", "100", {"relative_tolerance": 0.01}, "wrong"),
        (r"\boxed{1.73}", r"\boxed{\sqrt{3}}", {"relative_tolerance": 0.01}, "correct"),
        (r"\boxed{1.7}", r"\boxed{\sqrt{3}}", {"relative_tolerance": 0.01}, "wrong"),
        (r"\boxed{1.73}", r"\boxed{\sqrt{3}}", {}, "wrong"),
        (r"\boxed{\sqrt{3}}", "1.73", {"relative_tolerance": 0.01}, "correct"),
        (r"\boxed{x+1.001}", r"\boxed{x+1}", {"relative_tolerance": 0.01}, "wrong"),
        (r"\boxed{3.01, 7}", "[3, 7]", {"relative_tolerance": 0.01}, "correct"),
        (r"\boxed{7, 3.01}", "[3, 7]", {"relative_tolerance": 0.01}, "wrong"),
        (r"\boxed{30, 7.79}", r"\boxed{30^{\circ}, \frac{9\sqrt{3}}{2}}", {"relative_tolerance": 0.01}, "correct"),
        (r"\boxed{7.79, 30}", r"\boxed{30^{\circ}, \frac{9\sqrt{3}}{2}}", {"relative_tolerance": 0.01}, "wrong"),
        (r"\boxed{30, 7}", r"\boxed{30^{\circ}, \frac{9\sqrt{3}}{2}}", {"relative_tolerance": 0.01}, "wrong"),
        ("B", "A. 100", {"choices": ["100", "100.5"], "relative_tolerance": 0.01}, "wrong"),
        ("100.5", "A. 100", {"choices": ["100", "100.5"], "relative_tolerance": 0.01}, "wrong"),
        ("3.17", "3.14159", {"relative_tolerance": "wide"}, "wrong"),
        ("1.234,56 €", "1234.56", {}, "correct"),
        ("La réponse est 3,5", "3.5", {}, "correct"),
        ("1 1/2", "1.5", {}, "correct"),
        ("10²", "100", {}, "correct"),
        ("15 thousand", "15000", {}, "correct"),
        ("15 thousand", "15", {}, "wrong"),
        ("There are three dogs.", "3", {}, "correct"),
        ("two or three", "2", {}, "unparsed"),
        ("25 cm^2", "25", {}, "correct"),
        ("25 cm^2", "2", {}, "wrong"),
        ("5 V", "5", {}, "correct"),
        (r"0.\overline{3}", r"\frac{1}{3}", {}, "correct"),
        ("I don't think it's 5.", "5", {}, "unparsed"),
        # LaTeX
        ("2√3", r"2\sqrt{3}", {}, "correct"),
        ("pi/2", r"\frac{\pi}{2}", {}, "correct"),
        ("x**2+1", "1+x^2", {}, "correct"),
        ("x ≤ 2", r"(-\infty, 2]", {}, "correct"),
        ("x < 2", r"(-\infty, 2]", {}, "wrong"),
        ("so x != 2", "x=2", {}, "wrong"),
        ("10_2", "10_3", {}, "wrong"),
        ("The point is (1, -2).", "(1,-2)", {}, "correct"),
        ("\\boxed{\\frac{3}{4}}", "\\boxed{0.75}", {}, "correct"),
        ("(x+2)(x-2)", "x^2-4", {}, "correct"),
        ("\\sqrt 2", "1.414", {}, "wrong"),
        ("2\\sqrt{2}", "\\sqrt{8}", {}, "correct"),
        ("90°", "\\boxed{90^\\circ}", {}, "correct"),
        ("2 or 3", "2,3", {}, "correct"),
        ("(1,2)", "(2,1)", {"kind": "math"}, "wrong"),
        ("north", "thorn", {"kind": "math"}, "wrong"),
        ("So $x+1=4$, hence the result is\n\\[ 10\\text{ cm} \\]", "10", {}, "correct"),
        ("Thus it is \\(\\text{Even}\\).", "\\text{Even}", {}, "correct"),
        ("We find $2$ and $5$.", "\\{2, 5\\}", {}, "correct"),
        ("With $x=3$ there are 12 of them.", "3", {}, "wrong"),
        ("The tip is the point $B$.", "B", {"question": COLOURS}, "unparsed"),
        # lists
        ("[2007, 2008]", "[2007, 2008]", {}, "correct"),
        ("between 2007 and 2008", "[2007, 2008]", {}, "correct"),
        ("[2008, 2007]", "[2007, 2008]", {}, "wrong"),
        ('["a", "b"]', "['a', 'b']", {}, "correct"),
        # options
        ("dark red", "A", {"question": COLOURS}, "wrong"),
        ("red", "B", {"question": COLOURS}, "wrong"),
        ("The shape is dark red.", "B", {"question": COLOURS}, "correct"),
        ("The shape is not dark red.", "B", {"question": COLOURS}, "unparsed"),
        ("B. green", "B", {"question": COLOURS}, "wrong"),  # the letter of one option with the text of another
        ("A. dark red", "B. dark red", {"question": COLOURS}, "wrong"),
        ("The answer is either A or B.", "A", {}, "wrong"),
        ("It is not A, so I think it's B", "B", {"question": COLOURS}, "correct"),
        ("It is not A, B or C.", "C", {"question": COLOURS}, "unparsed"),
        ("The answer is surely D, it can't be A or B", "D", {}, "correct"),
        ("A cat is on the mat, so it must be C.", "C", {"question": COLOURS}, "correct"),
        ("A cat is on the mat.", "A", {"question": COLOURS}, "unparsed"),
        ("The wings are closed.", "(a) Open", {"question": WINGS}, "wrong"),
        ("C", "blue", {"choices": ["red", "dark red", "blue"]}, "correct"),
        ("16", "A", {"choices": ["6", "16"]}, "wrong"),
        ("\\boxed{\\frac{8}{11}}", "B", {"choices": ["3/11", "8/11"]}, "correct"),
        ("Happy Easter!", "(a) Happy Easter", {"choices": ["Happy Easter", "Happy Easter!"]}, "wrong"),
        # the numbers in a formula are not the options that read like them
        (r"\boxed{\dfrac{1}{2}}", r"B. $\frac{1}{2}$", {"choices": ["$2$", r"$\frac{1}{2}$"]}, "correct"),
        (r"\boxed{\dfrac{1}{2}}", "A. $2$", {"choices": ["$2$", r"$\frac{1}{2}$"]}, "wrong"),
        (r"\boxed{\frac{1}{2}}", "A", {"choices": ["2", "0.5"]}, "wrong"),
        (r"\boxed{2 + 3}", "B", {"choices": ["2", "5"]}, "correct"),
        (r"\boxed{2 + 3}", "A", {"choices": ["2", "5"]}, "wrong"),
        (r"\boxed{x = 5}", "B", {"choices": ["2", "5"]}, "correct"),
        (r"\boxed{\dfrac{1}{2} \text{ of the cake}}", "A", {"choices": ["2", "3"]}, "unparsed"),
        (r"So it is $\dfrac{1}{2}$.", "B", {"choices": ["$2$", r"$\frac{1}{2}$"]}, "correct"),
        (r"So it is $\dfrac{1}{2}$.", "A", {"choices": ["$2$", r"$\frac{1}{3}$"]}, "unparsed"),
        (r"So it is \frac { 1 }{ 2 } of it.", "A", {"choices": ["$2$", r"$\frac{1}{3}$"]}, "unparsed"),
        (r"So we get $x = 2$ here.", "A", {"choices": ["$2$", r"$\frac{1}{2}$"]}, "correct"),
        (r"The angle is $90^\circ$.", "B", {"choices": ["80°", "90°"]}, "correct"),
        (r"The angle is $90^\circ$.", "B", {"choices": ["80", "90"]}, "correct"),
        (r"The share is 5\% of it.", "B", {"choices": ["4%", "5%"]}, "correct"),
        (r"It costs \$5 or so.", "B", {"choices": ["$4", "$5"]}, "correct"),
        # a number that is denied is not the answer
        ("The answer is not 5, it is 6.", "5", {}, "wrong"),
        ("The answer is not 5, it is 6.", "6", {}, "correct"),
        ("The answer is not 5.", "5", {}, "unparsed"),
        ("So there are 6 cups, not 5.", "6", {}, "correct"),
        ("So there are 6 cups, not 5.", "5", {}, "wrong"),
        ("The answer is not 5 or 6.", "6", {}, "unparsed"),
        ("It isn't 5 but 6 cups.", "6", {}, "correct"),
        # free text
        ("The capital is Paris.", "Paris", {}, "correct"),
        ("The capital is not Paris.", "Paris", {}, "unparsed"),
        ("red and blue", "red, blue", {}, "correct"),
        ("paris.", "Paris", {}, "correct"),
        ("London", "Paris", {}, "wrong"),
        ("(b)", "b", {}, "correct"),
        ("I believe that it is the city of Paris", "Paris", {}, "unparsed"),
        # where the answer stands
        ("\\boxed{41}? No, \\boxed{42}", "42", {}, "correct"),
        ("\\boxed{42}? No, \\boxed{41}", "42", {}, "wrong"),
        ("<think>\\boxed{41}</think><answer>42</answer>", "42", {}, "correct"),
        ("<think>perhaps 42", "42", {}, "unparsed"),
        ("\\boxed{42} and \\boxed{43}", "42", {}, "wrong"),
        ("\\boxed{\\boxed{blue}}", "\\boxed{blue}", {}, "correct"),
        ("**Answer:** 42", "42", {}, "correct"),
        ("答案是42。", "42", {}, "correct"),
        ("\\boxed{4", "4", {}, "unparsed"),  # cut off: it may have gone on
        ("", "4", {}, "unparsed"),
        (None, "4", {}, "unparsed"),
        ("4", "", {}, "unparsed"),
        ("4", None, {}, "unparsed"),
        ("4", 4, {"precision": "none", "kind": 3, "choices": 7}, "correct"),
    ],
)
def test_verdicts(prediction, truth, hints, expected):
    assert status(prediction, truth, **hints) == expected


def test_a_verdict_says_which_rule_decided_and_on_what():
    verdict = judge("So the answer is (C).", "C. blue", question=COLOURS)
    assert (verdict.status, verdict.rule, verdict.answer) == ("correct", "choice:anchor", "C")


@pytest.mark.skipif(not SHARED.exists(), reason="the shared cases are not part of the repository")
def test_agreement_with_the_shared_cases():
    cases = json.loads(SHARED.read_text(encoding="utf-8"))
    wrong, false_correct = [], []
    for position, case in enumerate(cases):
        if position in MISLABELLED:
            continue
        hints = {key: case.get(key) for key in ("choices", "kind", "precision", "question")}
        right = status(case["prediction"], case["ground_truth"], **hints) == "correct"
        if right != case["expected_equal"]:
            (false_correct if right else wrong).append(position)
    assert not false_correct
    assert len(wrong) <= 0.05 * len(cases), wrong


def test_the_command_prints_one_verdict_a_line(tmp_path, capsys):
    path = tmp_path / "cases.json"
    path.write_text(
        json.dumps([{"prediction": "7", "ground_truth": "17"}, {"prediction": "yes", "ground_truth": "Yes"}])
    )
    assert main(["judge", str(path)]) == 0
    assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == ["wrong", "correct"]
    path.write_text(json.dumps([{"prediction": "\\boxed{\ud83d}", "ground_truth": "Paris"}]))  # half a character
    assert main(["judge", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "?"
    path.write_text('{"prediction": "7"}')
    assert main(["judge", str(path)]) == 2
    assert main(["judge", str(tmp_path / "none.json")]) == 2


# ------------------------------------------------------------------------ one answer, said in many ways

SENTENCES = (
    *("the result is {}", "So x = {}.", "**{}**", "\\boxed{{{}}}", "we get {}, as it should be"),
    *("it's {}", "3 times that is {}", "结果是{}", "from 7 down to {}", "$x={}$", "At 3, f(3) equals {}."),
)


@given(st.integers(1, 10**6), st.sampled_from(SENTENCES), st.sampled_from(["-{}", "−{}", "–{}", "-${}", "minus {}"]))
@settings(max_examples=60, deadline=None)
def test_a_sign_in_a_sentence_counts(value, sentence, signed):
    prediction = sentence.format(signed.format(value))
    if "boxed" in sentence or "$x" in sentence:
        prediction = sentence.format(f"-{value}")
    assert status(prediction, f"-{value}") == "correct"
    assert status(prediction, f"{value}") == "wrong"


@pytest.mark.parametrize("prediction", ["10-5", "range 10-5", "x - 5", "8 cm - 5 cm", "- 4\n- 5"])
def test_a_minus_between_operands_and_a_bullet_are_no_sign(prediction):
    assert find_numbers(prediction)[-1].value == 5


MARKS = (" ", "\\,", "\\!", ",\\!", ",\\! ", "{,}", "\\ ", "\u00a0", "\u202f", "'", "_", "~")
SEPARATED = ("{:,}", "\\${:,}", "USD {:,}", "{:,} dollars", "{:,}.00", *(f"{{:,}}|{mark}" for mark in MARKS))


@given(st.integers(1000, 10**9), st.sampled_from(SEPARATED), st.sampled_from(["{}", "\\boxed{{{}}}", "{} units"]))
@settings(max_examples=80, deadline=None)
def test_thousands_may_be_set_apart_in_many_ways(value, separated, sentence):
    form, _, mark = separated.partition("|")
    prediction = sentence.format(form.format(value).replace(",", mark or ","))
    assert status(prediction, str(value)) == "correct", prediction
    assert status(prediction, str(value // 1000)) == "wrong", prediction


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("so y=2", "2 = y", "correct"),
        ("2=y", "y=2", "correct"),
        ("The answer is y=2", "2 = y", "correct"),
        ("so x+y=5", "5=x+y", "correct"),
        ("The line is y = 3x + 2, which is steep.", "y=2+3x", "correct"),
        ("so f(x) = x^2", "x^2", "correct"),
        ("so y=2", "3 = y", "wrong"),
        ("so z = 2", "2 = y", "wrong"),
        ("we get y = 3x + 2", "y=2x+3", "wrong"),
    ],
)
def test_an_equation_holds_from_both_sides_and_after_words(prediction, truth, expected):
    assert status(prediction, truth) == expected


MARKERS = "<|im_end|> <|im_start|>user <|eot_id|> </s> <eos> <end_of_turn> [/INST] <|im_start|>user\\boxed{7} \nUser:7"


@pytest.mark.parametrize("marker", MARKERS.split(" "))
@pytest.mark.parametrize(
    "body", ["4 + 4 = 8, then 8 * 2 = 16.", "So $x = 16$", "\\boxed{16}", "The answer is 16.", "16", "<s>16"]
)
def test_what_a_chat_goes_on_with_is_no_answer(body, marker):
    assert status(body + marker, "16") == "correct"
    assert status(body + marker, "7") == status(body + marker, "8") == "wrong"


@pytest.mark.parametrize("wrapped", ["<|begin_of_box|>B<|end_of_box|>", "<|channel|>final<|message|>B<|return|>"])
def test_a_models_own_marks_around_its_answer_are_understood(wrapped):
    assert status(f"Perhaps A. {wrapped}", "B", question=COLOURS) == "correct"


DENIALS = """B不是 A|是B而不是A|选B不选A|B，A不对|Bであり、Aではない
정답은 B입니다. A가 아닙니다.|B nicht A|nicht A, sondern B|C'est B, pas A|B et non A
B y no A|no es A, es B|È B, non A|не A, а B|B, niet A|B, değil A
الجواب هو B وليس A|B, not A|not A but B|A is wrong, B is right
A is not correct; B is.|It can't be A, so B|B rather than A|B, since A is false
I would rule out A. So B.|The answer is not A but B"""


@pytest.mark.parametrize("prediction", re.split(r"[|\n]", DENIALS))
def test_an_option_that_is_denied_in_any_language_is_not_chosen(prediction):
    for hints in ({}, {"question": COLOURS}):
        assert status(prediction, "B", **hints) == "correct"
        assert status(prediction, "A", **hints) == "wrong"


YES_OR_NO = [
    (
        'Is the word in this image "Hello"?',
        "The word in this image is 'Hello'.|It says \"Hello\".|The sign reads Hello.|Oui|是的|I think yes.",
        "The word in this image is 'Goodbye'.|The word in this image is not 'Hello'.|Nein|不是|so no.|It says 'Help'.",
        "There is a word.|The image is blurry|The word 'Hello' may be there.|I would not say yes|yes and no",
    ),
    (
        "Is there a cat on the table?",
        "There is a cat on the table.|A cat is on the table.",
        "There is no cat on the table.|There isn't a cat on the table.",
        "There is a dog on the table.|A table is on the cat.",
    ),
    ('Is the "STOP" sign red?', 'The "STOP" sign is red.', 'The "STOP" sign isn\'t red.', 'The "STOP" sign is blue.'),
]


@pytest.mark.parametrize(("question", "yes", "no", "neither"), YES_OR_NO)
def test_a_sentence_that_repeats_the_question_answers_it(question, yes, no, neither):
    for texts, expected in ((yes, ["correct", "wrong"]), (no, ["wrong", "correct"]), (neither, ["unparsed"] * 2)):
        for text in texts.split("|"):
            assert [status(text, truth, question=question) for truth in ("Yes", "No")] == expected, text


# ------------------------------------------------------------------------------------ extraction


def test_boxes_are_balanced_nested_and_grouped():
    assert last_boxed("\\boxed{\\frac{1}{2}} then \\boxed{x_{1}^{2}}") == "x_{1}^{2}"
    assert last_boxed("\\boxed{1} and \\boxed{2") == "1"
    assert last_boxed("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert [contents for _, contents in boxed_groups("\\boxed{1} and $\\boxed{2}$, but \\boxed{3}")] == [
        ["1", "2"],
        ["3"],
    ]


@given(
    st.text(alphabet="ab1{}\\ ", max_size=30).filter(lambda t: _balanced(t)), st.text(alphabet="ab ., ", max_size=20)
)
@settings(max_examples=150, deadline=None)
def test_what_is_boxed_comes_out(content, around):
    assert last_boxed(f"{around}\\boxed{{{content}}}{around}") == content.strip()


def _balanced(text):
    depth, escaped = 0, False
    for character in text:
        if escaped or character == "\\":
            escaped = not escaped
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth < 0:
                return False
    return depth == 0 and not escaped and "boxed" not in text


@given(
    st.lists(st.from_regex(r"[a-z]{2,8}( [a-z]{2,8})?", fullmatch=True), min_size=2, max_size=6, unique=True),
    st.sampled_from(["{}. {}", "({}) {}", "{}) {}", "{}: {}"]),
    st.sampled_from(["\n", "\n\n"]),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_options_in_any_layout_are_found_and_told_apart(texts, layout, between, data):
    texts = [text for text in texts if normalize_text(text) not in ("yes", "no", "true", "false")] or ["one", "two"]
    letters = "ABCDEF"[: len(texts)]
    lines = [layout.format(letter, text) for letter, text in zip(letters, texts, strict=True)]
    question = "Which one?\n" + between.join(lines)
    if len(texts) > 1:
        assert list(parse_options(question).values()) == texts
    truth = data.draw(st.integers(0, len(texts) - 1))
    for chosen, letter in enumerate(letters):
        expected = "correct" if chosen == truth else "wrong"
        for prediction in (
            f"\\boxed{{{letter}}}",
            f"The answer is {letter}.",
            lines[chosen],
            f"\\boxed{{{texts[chosen]}}}",
        ):
            got = status(prediction, lines[truth], question=question, kind="choice")
            # With one option there is no list, and an unknown text is no answer.
            assert got == expected or (len(texts) == 1 and got == "unparsed"), prediction


def test_options_inline_and_the_last_list():
    assert parse_options(WINGS) == {"A": "Open", "B": "Closed"}
    assert parse_options("Example:\nA. x\nB. y\n\nQuestion:\nA. 1\nB. 2\nC. 3") == {"A": "1", "B": "2", "C": "3"}
    assert parse_options("No options (a) here") == {}
    assert split_choice("b: text") == ("B", "text") and split_choice("3.5") is None


# ----------------------------------------------------------------------------------- equivalence


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
@settings(max_examples=150, deadline=None)
def test_integers_equal_themselves_in_every_spelling_and_no_other(a, b):
    for spelling in (
        f"{a}",
        f"{a:,}",
        f"\\boxed{{{a}}}",
        f"${a}$",
        f"{a}.0",
        f"The answer is {a}.",
        f"<answer>{a}</answer>",
    ):
        assert status(spelling, str(a)) == "correct", spelling
        if a != b:
            assert status(spelling, str(b)) == "wrong", spelling


@given(st.decimals(-1000, 1000, places=4), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_precision_is_a_number_of_decimals(value, places):
    rounded = round(value, places)
    assert status(str(rounded), str(value), precision=places) == "correct"
    assert status(str(rounded + 2 * 10 ** -type(value)(places)), str(value), precision=places) == "wrong"


@given(st.from_regex(r"[A-Za-z]{3,10}( [A-Za-z]{3,10}){0,3}", fullmatch=True))
@settings(max_examples=80, deadline=None)
def test_text_equals_itself_whatever_its_case_and_markup(text):
    for spelling in (text.upper(), f"**{text}**", f" {text}. ", f'"{text}"', f"<answer>{text}</answer>"):
        assert status(spelling, text, kind="text") == "correct", spelling


@given(st.text(max_size=60), st.text(max_size=30), st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_gets_a_verdict(prediction, truth, question):
    assert status(prediction, truth, question=question) in ("correct", "wrong", "unparsed")


_TOKENS = (
    "\\boxed{ } { $ answer is \\frac{ ^ _ ( ) [ ] , and or A B 1 12 \\text{ <answer> </answer> <think> not % =".split()
)


@given(
    st.lists(st.sampled_from(_TOKENS), max_size=25).map(" ".join), st.sampled_from(["12", "B. red", "\\frac12", "Yes"])
)
@settings(max_examples=150, deadline=None)
def test_any_mixture_of_answer_forms_gets_a_verdict(prediction, truth):
    assert status(prediction, truth) in ("correct", "wrong", "unparsed")


@pytest.mark.parametrize(
    "text",
    [
        "{" * 2**20,
        "{" * 2**19 + "}" * 2**19,
        "\\boxed{" * 150_000,
        "\\boxed{" * 50_000 + "1" + "}" * 50_000,
        "\\frac{" * 10_000,
        "1," * 2**19,
        " " * 2**20 + "x",
        "answer is " * 10**5,
        "1 and " * 10**5,
        "(," * 2**19,
    ],
    ids=lambda text: text[:10],
)
def test_a_megabyte_of_anything_returns_at_once(text):
    start = time.process_time()
    for truth in ("12", "B. red", "\\frac{1}{2}", "[1, 2]"):
        assert status(text, truth) in ("wrong", "unparsed")
    assert status("12", text) in ("wrong", "unparsed")
    assert time.process_time() - start < 10


def test_a_computation_without_end_is_cut_off_and_the_next_answer_comes(monkeypatch):
    monkeypatch.setattr(mathcheck, "TIMEOUT_S", 2.0)
    assert status("\\boxed{9^{9^{9^{9}}}}", "\\frac{1}{7}") == "unparsed"
    assert status("\\boxed{\\frac{2}{14}}", "\\frac{1}{7}") == "correct"


def test_threads_may_judge_at_once():
    verdicts = {}

    def work(i):
        verdicts[i] = status(f"\\boxed{{\\frac{{{i}}}{{3}}}}", f"\\frac{{{2 * i}}}{{6}}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(1, 17), "correct")


def test_numbers_in_prose():
    assert [float(n.value) for n in find_numbers("H2O: 3 of 1,000 cost $2.50, -½ or 1e3; x-4")] == [
        3,
        1000,
        2.5,
        -0.5,
        1000,
        4,
    ]
    assert parse_number("2x") is None and parse_number("3 apples").value == 3


def test_the_most_explicit_part_comes_first():
    found = candidates("The answer is 3. Hence \\boxed{4}. Final answer: 5")
    assert [(c.text, c.rule) for c in found][:2] == [("5", "final_answer"), ("4", "boxed")]
