"""Text of an answer -> the part that answers: pure functions on strings, linear in their length.

The module knows the forms of answers (tags, boxes, anchors such as "the answer is", option letters), not
whether an answer is right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LETTER = r"[A-Za-z]"
_LINE_OPTION = re.compile(rf"^[ \t]*(?:\(({_LETTER})\)|({_LETTER})[.):])[ \t]*(.*)$", re.MULTILINE)
_INLINE_OPTION = re.compile(rf"(?<![\w(])\(({_LETTER})\)[ \t]*")
_CHOICE = re.compile(rf"\s*(?:\(\s*({_LETTER})\s*\)|({_LETTER})\s*[.):](?!\d))\s*(.*)$", re.DOTALL)
_MARKUP = re.compile(r"[*`]+|(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9{(])")
_FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3002: ". ", 0x2212: "-", 0x3000: " "}

_BOX = re.compile(r"\\(?:begin)?(?:boxed|fbox|framebox)\s*(\{|[A-Za-z0-9](?![A-Za-z0-9]))")
_BRACE_TOKEN = re.compile(r"\\.|[{}]", re.DOTALL)
_MATH_NOISE = re.compile(r"\\q?quad|\\[()\[\],;:! ]|\$|\s+|[*.]")
# What may stand between two boxes that are one answer: a comma, "and"/"or", the next variable, "for part (b)".
_BOX_LINK = re.compile(
    r"(?:[,;]|\\text\{[^{}]{0,40}\b(?:and|or)\b[^{}]{0,40}\}|[,;]?(?:and|or))?[,;]?(?:[A-Za-z](?:_\{?\w{1,3}\}?)?=)?"
)

_STRONG_ANCHOR = re.compile(r"(?i)final\s+answer\b[*\"' ]*(?:[^.:\n]{0,100}?\bis\b[*: ]*|:[*\s]*|$)")
_WEAK_ANCHOR = re.compile(
    r"(?i)(?:\banswer\b[*\"' ]*(?:to\b[^.:\n]{1,100}?)?\s*(?::|=|\bis\b|\bwould\s+be\b|\bshould\s+be\b|\bmust\s+be\b)"
    r"|\b(?:correct|right|best)\s+(?:option|choice)\s*(?::|is\b)"
    r"|\b(?:r[ée]ponse|antwort|respuesta|resposta|risposta)\b\s*(?::|=|\b(?:est|ist|es|é|è)\b)"
    r"|答案\s*(?:是|为|為|:|：)?|ответ\s*:|答え\s*(?:は|:|：))[*:\s]*"
)
_AFTERTHOUGHT = re.compile(r"(?i)\.?\s*I hope (?:it|this) is correct")
# Where a chat goes on after the answer: control tokens of chat templates, or a user's turn that the model wrote itself.
_MARKER = r"(?:<\|(?!begin_of_box|end_of_box)[\w ]{1,30}\|>|</?s>|<(?:eos|pad|(?:start|end)_of_turn)>|\[/?INST\])"
_NEXT_TURN = re.compile(rf"{_MARKER}|\n\s*(?:#+\s*)?(?:Human|User)\s*:")


@dataclass(frozen=True)
class Candidate:
    """A part of a prediction that may be its answer, and how it was found.

    `rule`: answer_tag, boxed, final_answer, anchor ("the answer is ..."), formula (the last one of the text, with no
    number after it), or text (all of it).
    """

    text: str
    rule: str

    @property
    def explicit(self) -> bool:
        return self.rule not in ("formula", "text")


def candidates(prediction: str) -> list[Candidate]:
    """Possible answers, most explicit first; empty for an empty prediction.

    An `<answer>` tag wins over all. Then the later of the last balanced box and the last "final answer is". Then the
    last "answer is" or "Answer:". The text itself comes last, and not at all when there is a box or when a
    `<think>` was never closed.
    """
    text, complete = strip_reasoning(prediction)
    text = first_turn(text)
    found: list[Candidate] = []
    if (inside := answer_tag(text)) is not None:
        inner = candidates(inside)
        return [Candidate(c.text, "answer_tag" if c.rule == "text" else c.rule) for c in inner]
    strong: list[tuple[int, Candidate]] = []
    if boxes := boxed_groups(text):
        start, contents = boxes[-1]
        strong.append((start, Candidate(unbox(", ".join(contents)), "boxed")))
    if (anchored := _after_last(_STRONG_ANCHOR, text)) and last_boxed(anchored[1]) is None:
        strong.append((anchored[0], Candidate(anchored[1], "final_answer")))
    found += [candidate for _, candidate in sorted(strong, key=lambda item: -item[0])]
    if anchored := _after_last(_WEAK_ANCHOR, text):
        found.append(Candidate(anchored[1], "anchor"))
    if complete and text.strip() and not boxes:
        if formula := _last_formula(text):
            found.append(Candidate(formula, "formula"))
        found.append(Candidate(_AFTERTHOUGHT.split(text, maxsplit=1)[0].strip() or text.strip(), "text"))
    return [candidate for candidate in found if candidate.text.strip()]


def _last_formula(text: str) -> str | None:
    """The last LaTeX formula, or the last ones joined by a comma or "and"; None when a number follows it."""
    formulas = list(_FORMULA.finditer(text))
    if not formulas or re.search(r"\d", text[formulas[-1].end() :]):
        return None
    contents = [next(group for group in formulas[-1].groups() if group)]
    for earlier, later in zip(reversed(formulas[:-1]), reversed(formulas[1:]), strict=True):
        if not re.fullmatch(r"\s*(?:,|,?\s*(?:and|or)\b)\s*", text[earlier.end() : later.start()]):
            break
        contents.insert(0, next(group for group in earlier.groups() if group))
    return ", ".join(content.strip() for content in contents)


_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\\)\$(?![\s$])([^$\n]+?)(?<![\s\\])\$(?!\d)"
    r"|\\\[((?:[^\\]|\\[^\[\]])+)\\\]|\\\(((?:[^\\]|\\[^()])+)\\\)"
)


def strip_reasoning(text: str) -> tuple[str, bool]:
    """Text after the last `</think>`, and whether the reasoning was finished (an open `<think>` is not)."""
    for end in ("</think>", "<|channel|>final<|message|>"):
        if end in text:
            return text.rpartition(end)[2], True
    return text, "<think>" not in text


def first_turn(text: str) -> str:
    """The text up to where the chat goes on, with a user's turn or a control token; tokens before it are left out."""
    text = re.sub(rf"\A(?:\s*{_MARKER})+(?:assistant\b)?", "", text)
    text = _NEXT_TURN.split(text, maxsplit=1)[0]
    return text if "<answer>" in text else text.split("</answer>", 1)[0]


def answer_tag(text: str) -> str | None:
    """Content of the last non-empty `<answer>` tag; one that was never closed runs to the end. None without."""
    pieces = re.split(r"<answer>|<\|begin_of_box\|>", text)[1:]
    contents = [re.split(r"</answer>|<\|end_of_box\|>", piece, maxsplit=1)[0].strip() for piece in pieces]
    return next((content for content in reversed(contents) if content), None)


def boxed_groups(text: str) -> list[tuple[int, list[str]]]:
    """Outermost balanced boxes as (position, contents); boxes joined by a comma or "and" are one group."""
    closing = _matching_braces(text) if _BOX.search(text) else {}
    groups: list[tuple[int, list[str]]] = []
    end = -1
    for match in _BOX.finditer(text):
        opening = match.end() - 1
        stop = closing.get(opening) if match[1] == "{" else opening
        if stop is None or match.start() < end:
            continue
        content = text[opening + 1 : stop] if match[1] == "{" else match[1]
        between = text[end : match.start()] if groups else None
        if between is not None and len(between) < 120 and _BOX_LINK.fullmatch(_MATH_NOISE.sub("", between)):
            groups[-1][1].append(content.strip())
        else:
            groups.append((match.start(), [content.strip()]))
        end = stop + 1
    return groups


def _matching_braces(text: str) -> dict[int, int]:
    stack, closing = [], {}
    for match in _BRACE_TOKEN.finditer(text):
        if match[0] == "{":
            stack.append(match.start())
        elif match[0] == "}" and stack:
            closing[stack.pop()] = match.start()
    return closing


def last_boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{...} (of all boxes in it that form one answer); None without."""
    groups = boxed_groups(text)
    return ", ".join(groups[-1][1]) if groups else None


def unbox(text: str) -> str:
    """The content of a text's last box when there is one, else the text itself, without surrounding space."""
    for _ in range(4):
        if (inside := last_boxed(text)) is None:
            break
        text = inside
    return text.strip()


def _after_last(anchor: re.Pattern, text: str) -> tuple[int, str] | None:
    """(position, rest of the line) after the last anchor; the next line when nothing follows on its own."""
    for match in reversed(list(anchor.finditer(text))):
        rest = _AFTERTHOUGHT.split(text[match.end() : match.end() + 4000], maxsplit=1)[0].strip()
        rest = rest.split("\n", 1)[0].strip() if not re.match(r"\$\$|\\\[|\$", rest) else rest.split("\n\n", 1)[0]
        if rest.strip("*: ."):
            return match.start(), rest
    return None


def parse_options(question: str | None) -> dict[str, str]:
    """Options named in a question, by upper-case letter in order; empty when there are none.

    Lines "A. text", "A) text", "(a) text", "A: text", or "(a) text (b) text" in a line. Letters run A, B, C, ...
    without a gap; the last run in the text counts, and one option alone is no list.
    """
    if not question:
        return {}
    question = re.sub(r"\\n(?=\s*\(?[A-Z]\s*[).:])|\\n(?=\s*\([a-z]\))", "\n", question)
    by_line = _last_run([((m[1] or m[2]).upper(), m[3]) for m in _LINE_OPTION.finditer(question)])
    marks = list(_INLINE_OPTION.finditer(question))
    ends = [*(mark.start() for mark in marks), len(question)][1:]
    inline = _last_run(
        [(mark[1].upper(), question[mark.end() : end].split("\n")[0]) for mark, end in zip(marks, ends, strict=False)]
    )
    return inline if len(inline) > len(by_line) else by_line


def options_of(choices: Sequence[Any] | Mapping[str, Any] | None, question: str | None) -> dict[str, str]:
    """Options by upper-case letter: those given, as texts in order or by letter, else those named in the question."""
    if isinstance(choices, Mapping):
        return {str(letter).upper(): as_text(text) for letter, text in choices.items()}
    if isinstance(choices, Iterable) and not isinstance(choices, str) and (choices := list(choices)):
        texts = [as_text(choice) for choice in choices][:26]
        # Choices such as "(a) Open" bring their letter along.
        parts = [split_choice(text) for text in texts]
        if all(part and part[0] == chr(65 + i) and part[1] for i, part in enumerate(parts)):
            texts = [part[1] for part in parts]
        return {chr(65 + i): text for i, text in enumerate(texts)}
    return parse_options(question if isinstance(question, str) else None)


def as_text(value: Any) -> str:
    """A value as text, None as none at all."""
    return value if isinstance(value, str) else "" if value is None else str(value)


def _last_run(found: list[tuple[str, str]]) -> dict[str, str]:
    run: dict[str, str] = {}
    best: dict[str, str] = {}
    for letter, text in found:
        if letter == "A":
            run = {}
        if letter == chr(ord("A") + len(run)):
            run[letter] = text.strip()
            best = run if len(run) > 1 else best
    return best


def split_choice(text: str) -> tuple[str, str] | None:
    """("B", "option text") from `B. text`, `B: text`, `B) text` or `(b) text`; the text may be empty. Else None."""
    match = _CHOICE.match(text)
    return ((match[1] or match[2]).upper(), match[3].strip()) if match else None


def plain(text: str) -> str:
    """Full-width characters, the minus sign and Markdown emphasis made plain; nothing else changes."""
    return _MARKUP.sub("", text.translate(_FULLWIDTH))


def normalize_text(text: str) -> str:
    """Text for comparison: lower case, no Markdown, quotes, articles or sentence punctuation, single spaces."""
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", plain(text))
    text = re.sub(r"(?<!\w)(?:a|an|the)\s+(?=\w)", "", text.casefold())
    text = re.sub(r"\$|\\[()\[\]]", "", text)
    text = re.sub(r"[\"“”]|(?<=\w)['’](?=\w)|(?<!\S)['‘]|['’](?!\S)(?<=[\w.]['’])", "", text)
    text = re.sub(r"(?<=\w)[,;:!?.]+(?=\s|$)|(?<=\s)[,;:!?.]+(?=\s|$)|(?<=[)\]])[.,;:](?=\s|$)", " ", text)
    return " ".join(text.split())
