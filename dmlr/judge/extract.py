"""Text of an answer -> the part that answers: pure functions on strings, linear in their length.

The module knows the forms of answers (tags, boxes, anchors such as "the answer is", option letters) and what a text
denies, not whether an answer is right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BOX = re.compile(r"\\(?:begin)?(?:boxed|fbox|framebox)\s*(\{|[A-Za-z0-9](?![A-Za-z0-9]))")
_BRACE_TOKEN = re.compile(r"\\.|[{}]", re.DOTALL)
_MATH_NOISE = re.compile(r"\\q?quad|\\[()\[\],;:! ]|\$|\s+|[*.]")
# What may stand between two boxes that are one answer: a comma, "and"/"or", the next variable, "for part (b)".
_BOX_LINK = re.compile(
    r"(?:[,;]|\\text\{[^{}]{0,40}\b(?:and|or)\b[^{}]{0,40}\}|[,;]?(?:and|or))?[,;]?(?:[A-Za-z](?:_\{?\w{1,3}\}?)?=)?"
)
_ANCHORS = {
    "final_answer": re.compile(r"(?i)final\s+answer\b[*\"' ]*(?:[^.:\n]{0,100}?\bis\b[*: ]*|:[*\s]*|$)"),
    "anchor": re.compile(
        r"(?i)(?:\banswer\b[*\"' ]*(?:to\b[^.:\n]{1,100}?)?\s*(?::|=|\b(?:is|(?:would|should|must)\s+be)\b)"
        r"|\b(?:correct|right|best)\s+(?:option|choice)\s*(?::|is\b)"
        r"|\b(?:r[ée]ponse|antwort|respuesta|resposta|risposta)\b\s*(?::|=|\b(?:est|ist|es|é|è)\b)"
        r"|答案\s*(?:是|为|為|:|：)?|ответ\s*:|答え\s*(?:は|:|：))[*:\s]*"
    ),
}
_AFTERTHOUGHT = re.compile(r"(?i)\.?\s*I hope (?:it|this) is correct")
_LAST_REASON = re.compile(r"(?<=[^\s.!?:]) (?:because|since) [^.,\n]*\.?\s*\Z")
_REASON = re.compile(r"(?i),?\s+(?:because|since)\b|,\s*(?:not|rather than|instead of)\b")
# Where a chat goes on after the answer: control tokens of chat templates, or a user's turn that the model wrote itself.
_MARKER = r"(?:<\|(?!begin_of_box|end_of_box)[\w ]{1,30}\|>|</?s>|<(?:eos|pad|(?:start|end)_of_turn)>|\[/?INST\])"
_NEXT_TURN = re.compile(rf"{_MARKER}|\n\s*(?:#+\s*)?(?:Human|User)\s*:")
_FORMULA = re.compile(
    r"(?:\$\$|\\[\[(])((?:\\[^\[\]()]|[^\\$]|\$(?!\$))+)(?:\$\$|\\[\])])"
    r"|(?<!\\)\$(?![\s$])([^$\n]+?)(?<![\s\\])\$(?!\d)"
)
MACRO = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|operatorname|mbox)\s*\{([^{}]*)\}")


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
    text = _first_turn(text)
    for piece in reversed(re.split(r"<answer>|<\|begin_of_box\|>", text)[1:]):
        if inside := re.split(r"</answer>|<\|end_of_box\|>", piece, maxsplit=1)[0].strip():
            return [Candidate(c.text, "answer_tag" if c.rule == "text" else c.rule) for c in candidates(inside)]
    boxes = boxed_groups(text)
    strong = [(start, Candidate(unbox(", ".join(contents)), "boxed")) for start, contents in boxes[-1:]]
    strong += _after_last("final_answer", text)
    found = [candidate for _, candidate in sorted(strong, key=lambda item: -item[0])]
    found += [candidate for _, candidate in _after_last("anchor", text)]
    if complete and not boxes:
        found.append(Candidate(_last_formula(text), "formula"))
        whole = _AFTERTHOUGHT.split(text, maxsplit=1)[0].strip() or text
        found += [Candidate(part, "text") for part in dict.fromkeys((_LAST_REASON.sub("", whole), whole))]
    return [candidate for candidate in found if candidate.text.strip()]


def strip_reasoning(text: str) -> tuple[str, bool]:
    """Text after the last `</think>`, and whether the reasoning was finished (an open `<think>` is not)."""
    for end in ("</think>", "<|channel|>final<|message|>"):
        if end in text:
            return text.rpartition(end)[2], True
    return text, "<think>" not in text


def _first_turn(text: str) -> str:
    """The text up to where the chat goes on, with a user's turn or a control token; tokens before it are left out."""
    text = re.sub(rf"\A(?:\s*{_MARKER})+(?:assistant\b)?", "", text)
    text = _NEXT_TURN.split(text, maxsplit=1)[0]
    return text if "<answer>" in text else text.split("</answer>", 1)[0]


def _after_last(rule: str, text: str) -> list[tuple[int, Candidate]]:
    """(position, rest of the line) after the last anchor; the next line when nothing follows on its own."""
    for match in reversed(list(_ANCHORS[rule].finditer(text))):
        rest = _AFTERTHOUGHT.split(text[match.end() : match.end() + 4000], maxsplit=1)[0].strip()
        rest = rest.split("\n\n" if re.match(r"\$|\\\[", rest) else "\n", 1)[0]
        rest = _REASON.split(rest, maxsplit=1)[0].strip()
        if rest.strip("*: ."):
            return [(match.start(), Candidate(rest, rule))]
    return []


def _last_formula(text: str) -> str:
    """The last LaTeX formula, or the last ones joined by a comma or "and"; "" when a number follows it."""
    formulas = list(_FORMULA.finditer(text))
    if not formulas or re.search(r"\d", text[formulas[-1].end() :]):
        return ""
    joined = [formulas[-1]]
    for earlier in reversed(formulas[:-1]):
        if not re.fullmatch(r"\s*(?:,|,?\s*(?:and|or)\b)\s*", text[earlier.end() : joined[0].start()]):
            break
        joined.insert(0, earlier)
    return ", ".join((match[1] or match[2]).strip() for match in joined)


def boxed_groups(text: str) -> list[tuple[int, list[str]]]:
    """Outermost balanced boxes as (position, contents); boxes joined by a comma or "and" are one group."""
    stack: list[int] = []
    closing: dict[int, int] = {}  # position of a brace -> of its partner
    for token in _BRACE_TOKEN.finditer(text) if _BOX.search(text) else ():
        if token[0] == "{":
            stack.append(token.start())
        elif token[0] == "}" and stack:
            closing[stack.pop()] = token.start()
    groups: list[tuple[int, list[str]]] = []
    end = -1
    for match in _BOX.finditer(text):
        start = match.start(1)
        stop = closing.get(start) if match[1] == "{" else start
        if stop is None or start < end:
            continue
        content = text[start + 1 : stop].strip() if match[1] == "{" else match[1]
        between = text[end : match.start()]
        if groups and len(between) < 120 and _BOX_LINK.fullmatch(_MATH_NOISE.sub("", between)):
            groups[-1][1].append(content)
        else:
            groups.append((match.start(), [content]))
        end = stop + 1
    return groups


def last_boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{...} (of all boxes in it that form one answer); None without."""
    groups = boxed_groups(text)
    return ", ".join(groups[-1][1]) if groups else None


def unbox(text: str) -> str:
    """The content of a text's last box when there is one, else the text itself, without surrounding space."""
    inside = last_boxed(text)
    return (text if inside is None else inside).strip()


# ---------------------------------------------------------------------------------------------- options

_LETTER = r"(?:\([ \t]*([A-Za-z])[ \t]*\)|([A-Za-z])[ \t]*[.):])"
_CHOICE = re.compile(rf"\s*{_LETTER}(?!\d)\s*(.*)$", re.DOTALL)
_LINE_OPTION = re.compile(rf"^[ \t]*{_LETTER}[ \t]*(.*)$", re.MULTILINE)
_INLINE_OPTION = re.compile(r"(?<![\w(])\(([A-Za-z])\)()([^\n]*?)(?=(?<![\w(])\([A-Za-z]\)|$)", re.MULTILINE)


def parse_options(question: str | None) -> dict[str, str]:
    """Options named in a question, by upper-case letter in order; empty when there are none.

    Lines "A. text", "A) text", "(a) text", "A: text", or else "(a) text (b) text" in a line. Letters run A, B, C, ...
    without a gap; the last run in the text counts, and one option alone is no list.
    """
    question = re.sub(r"\\n(?=\s*\(?[A-Z]\s*[).:]|\s*\([a-z]\))", "\n", question or "")
    for option in (_LINE_OPTION, _INLINE_OPTION):
        run: dict[str, str] = {}
        best: dict[str, str] = {}
        for match in option.finditer(question):
            letter = (match[1] or match[2]).upper()
            if letter == "A":
                run = {}
            if letter == chr(ord("A") + len(run)):
                run[letter] = match[3].strip()
                best = run if len(run) > 1 else best
        if best:
            return best
    return {}


def options_of(choices: Sequence[Any] | Mapping[str, Any] | None, question: str | None) -> dict[str, str]:
    """Options by upper-case letter: those given, as texts in order or by letter, else those named in the question."""
    if isinstance(choices, Mapping):
        return {str(letter).upper(): as_text(text) for letter, text in choices.items()}
    if isinstance(choices, Iterable) and not isinstance(choices, str) and (choices := list(choices)):
        options = {chr(65 + i): as_text(choice) for i, choice in enumerate(choices[:26])}
        # Choices such as "(a) Open" bring their letter along.
        parts = [split_choice(text) for text in options.values()]
        return dict(parts) if all(parts) and [letter for letter, _ in parts] == list(options) else options
    return parse_options(question if isinstance(question, str) else None)


def split_choice(text: str) -> tuple[str, str] | None:
    """("B", "option text") from `B. text`, `B: text`, `B) text` or `(b) text`; the text may be empty. Else None."""
    match = _CHOICE.match(text)
    return ((match[1] or match[2]).upper(), match[3].strip()) if match else None


# ------------------------------------------------------------------------------------------------ words

_MARKUP = re.compile(  # but not the stars of 2*3, 2 * 3 and x**2
    r"(?<![A-Za-z0-9)}\]\\*`])[*`]+(?=[^\s*`])|(?<=[^\s*`])[*`]+(?![A-Za-z0-9(\\{*`])"
    r"|(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9{(])"
)
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3002: ". ", 0x2212: "-", 0x3000: " "}
_QUOTES = re.compile("[\"“”'‘’]|(?<=\\b[a-z])[.](?=[a-z]\\b)")  # and the dots of U.S.

# Words that deny what follows, in the languages that models answer in.
_NOT = (
    r"(?:(?<!\w)(?:not|neither|nor|never|cannot|impossible|unable|without|nicht|kein|pas|non|no|não|nao|niet|geen|nie|hindi|ne|не|нет)(?!\w)"
    r"|n['’]t(?!\w)|rather than|instead of|except|excluding|other than|all but|không phải|không|değil|ليس|وليس|ليست"
    r"|不是|不选|不選|不为|不能|并非|並非|而非|不會|不会)"
)
DENIES = re.compile(rf"(?i){_NOT}")
_NOT_BEFORE = re.compile(
    rf"(?i){_NOT}(?:(?!\b(?:but|doubt|more|less|only)\b)[^.,;:!?\n\d]){{0,40}}$"
    r"|\b(?:more|greater|larger|bigger|higher|less|fewer|smaller|lower) than\s+\W?$"
)
# "does not stop for 20 minutes" denies the stop, not the number.
_NOT_THE_VERB = re.compile(
    r"(?i)(?:not|n['’]t|cannot|never) (?!be |think |believe |go |opt )[a-z]+ "
    r"(?:for|until|till|before|after|within|in|during|over|under|at)(?: (?:a|an|the|about|another|at least))?\s+$"
)
_NOT_AFTER = re.compile(  # but "B is not A" and "B不是A" name B
    r"(?i)[)\]*\"']*\s*(?:(?:is|are|was|can|could|would|does|ist|est|es|é|è)\s*)?"
    r"(?:not\b|n['’]t\b|cannot\b|wrong\b|incorrect|false\b|(?:be )?(?:excluded|ruled out|eliminated)"
    r"|nicht\b|falsch|faux\b|no es\b|n['’]est pas|невер|неправ|değil"
    r"|不对|不是|不正确|错|ではない|ではありません|(?:가|이|는|은) 아[니닙]|नहीं)"
    r"(?!\s*\(?[A-Z](?![A-Za-z]))"
)
_JOIN = re.compile(r"[*$\s()]*(?:[,/&]|,?\s*\b(?:and|or|et|ou|und|oder|y|o|e|и|или)\b|[和或、])[*$\s()]*")


def stated(text: str, found: Sequence[re.Match], last: bool) -> tuple[re.Match | None, bool]:
    """The first or last of some parts of a text that is not denied ("not A but B"), and whether it stands alone (not
    "A or B"). What is joined to a denied part is denied too: "not A, B or C".
    """
    said: list[tuple[re.Match, bool]] = []  # each with whether it is joined to the one before
    denied = False
    for before, match in zip([None, *found], found, strict=False):
        joined = before is not None and bool(_JOIN.fullmatch(text[before.end() : match.start()]))
        ahead = text[max(0, match.start() - 60) : match.start()]
        letter = match[0].strip(" ()").isalpha()
        denied_here = _NOT_BEFORE.search(ahead) and (letter or not _NOT_THE_VERB.search(ahead))
        denied = (denied and joined) or bool(denied_here)
        if not denied and not _NOT_AFTER.match(text[match.end() : match.end() + 30]):
            said.append((match, joined and bool(said) and said[-1][0] is before))
    if not said:
        return None, True
    at = len(said) - 1 if last else 0
    return said[at][0], not said[at][1] and not (at + 1 < len(said) and said[at + 1][1])


def as_text(value: Any) -> str:
    """A value as text, None as none at all."""
    return value if isinstance(value, str) else "" if value is None else str(value)


def plain(text: str) -> str:
    """Full-width characters, the minus sign and Markdown emphasis made plain; nothing else changes."""
    return _MARKUP.sub("", text.translate(_PLAIN))


def normalize_text(text: str) -> str:
    """Text for comparison: lower case, no Markdown, quotes, articles, hyphens or punctuation, single spaces."""
    text = re.sub(r"\$|\\[()\[\]]", "", MACRO.sub(r"\1", plain(text)).casefold())
    text = _QUOTES.sub("", re.sub(r"(?<!\w)(?:a|an|the)\s+(?=\w)", "", text))
    return " ".join(re.sub(r"[,;:!?.]+(?=\s|$)|(?<=[^\W\d_])-(?=[^\W\d_])", " ", text).split())
