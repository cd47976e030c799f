"""What the walkthrough shows of a moment or an outcome, in words and tables. Pure functions.

Numbers of think tokens, rows and columns begin with one, as people count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pandas as pd

from dmlr.judge.extract import last_boxed
from dmlr.show.figures import Heat
from dmlr.show.plots import Grid, token_colour
from notebooks.walkthrough.walk import Moment, NextTokens, Walk
from notebooks.walkthrough.what_if import Change, Outcome

RIGHT = {True: " ✓", False: " ✗", None: ""}  # behind an answer


# words


def place(patch: int, grid: Grid) -> str:
    """Where an image token lies; those beyond the grid (thumbnails, further images) have a number only."""
    if patch >= grid[0] * grid[1]:
        return f"image token {patch}"
    return f"row {patch // grid[1] + 1}, column {patch % grid[1] + 1}"


def final(text: str, limit: int = 60) -> str:
    """What an answer comes to: its last box, else its end."""
    text = " ".join((last_boxed(text) or text).split())
    return text if len(text) <= limit else "…" + text[-limit:]


def _short(answer: str, is_right: bool | None) -> str:
    return final(answer) + RIGHT[is_right]


def describe(change: Change, grid: Grid) -> str:
    """A change in words."""
    parts = [f"without think token {token + 1}'s patch at {place(patch, grid)}" for token, patch in sorted(change.drop)]
    if len(parts) > 1:
        parts = [f"without {len(parts)} patches"]
    parts += [f"think token {token + 1} frozen" for token in sorted(change.freeze)]
    parts += [] if change.seed is None else [f"seed {change.seed}"]
    return "; ".join(parts) or "as it is"


def caption(moment: Moment, grid: Grid, token: int | None = None) -> str:
    """One line of what the figure of a moment shows; `token` None: all think tokens."""
    state = "the start" if not moment.iteration else ("kept" if moment.accepted else "tried and dropped again")
    where = ", ".join(
        f"think token {t + 1} at " + " and ".join(place(p, grid) for p in patches)
        for t, patches in enumerate(moment.patches)
        if patches and token in (None, t)
    )
    who = "all think tokens (mean)" if token is None else f"think token {token + 1}"
    return (
        f"Iteration {moment.iteration}, {state}: reward {moment.reward:.5f}. Attention of {who}. "
        f"Patches: {where or 'none'}."
    )


def headline(walk: Walk) -> str:
    """What came of the question, in a sentence or three."""
    record, moments = walk.dmlr.reasoning, walk.moments
    vanilla, dmlr = (_short(said.text, walk.is_right(said)) for said in (walk.vanilla, walk.dmlr))
    changing = ", ".join(map(str, turns(moments)))
    return (
        f"Vanilla answers {vanilla}; behind think tokens as they come the answer is "
        f"{_short(moments[0].answer, moments[0].is_right)}, and after DMLR {dmlr}. The reward rose from "
        f"{record.start_reward:.4f} to {record.best_reward:.4f} by iteration {record.best_step} of "
        f"{len(record.steps)}; of the states tried {sum(m.accepted for m in moments)} raised it, and the answer comes "
        f"from the last of them, with {sum(map(len, record.patches))} patches. "
        + (f"The answer changes in iteration {changing}." if changing else "No iteration changes it.")
    )


# of the moments, what is drawn


def heat(moment: Moment, token: int | None = None, title: str = "") -> Heat:
    """Attention of one think token, or the mean of all, with the patches tried."""
    return Heat(moment.attention, moment.patches, token, title, moment.accepted)


def curve(moments: Sequence[Moment]) -> list[tuple[float, bool]]:
    """Per iteration: reward of the state tried, kept."""
    return [(m.reward, m.accepted) for m in moments]


def turns(moments: Sequence[Moment]) -> list[int]:
    """The iterations whose answer is not that of the state tried before."""
    return [after.iteration for before, after in pairwise(moments) if after.answer != before.answer]


def chosen(moments: Sequence[Moment]) -> list[Moment]:
    """At most eight moments to print: the start, the last, the best, where the answer changes; then evenly spread."""
    last = len(moments) - 1
    best = max((m.iteration for m in moments if m.accepted), default=0)
    even = [round(i * last / 7) for i in range(8)]
    wanted = list(dict.fromkeys([0, last, best, *turns(moments), *even]))[:8]
    return [moments[t] for t in sorted(wanted)]


# tables


def moments_table(walk: Walk) -> pd.DataFrame:
    """A row per iteration: noise, reward, whether kept, patches, next tokens of the first think tokens, the answer."""
    rows = []
    for m in walk.moments:
        sigma = f"{100 * m.sigma / walk.vlm.embedding_rms:.0f} %" if m.sigma else "–"
        row = {"iteration": m.iteration, "σ": sigma, "reward": f"{m.reward:.4f}", "kept": "✓" * m.accepted}
        row["patches"] = sum(map(len, m.patches))
        for t, tokens in enumerate(m.next_tokens[:4]):  # more would not fit a page
            row[f"τ{t + 1}"] = " ".join(f"{visible(text)}\u00a0{p:.2f}" for text, p in tokens[:2])
        rows.append(row | {"answer": _short(m.answer, m.is_right)})
    return pd.DataFrame(rows)


def answers_table(walk: Walk) -> pd.DataFrame:
    """Every different answer once, in full, with the iterations from whose states it was decoded."""
    rows = [{"iterations": str(m.iteration), "answer": f"{m.answer}{RIGHT[m.is_right]}"} for m in walk.moments]
    return pd.DataFrame(rows).groupby("answer", sort=False, as_index=False).agg(", ".join)[["iterations", "answer"]]


def outcomes_table(walk: Walk, outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A row per what-if; its answer is compared with DMLR's as it was."""
    return pd.DataFrame(
        {
            "what if": describe(o.change, walk.grid),
            "patches": sum(map(len, o.patches)),
            "reward": f"{o.reward:.5f}",
            "answer": _short(o.answer, o.is_right),
            "changed": "yes" if final(o.answer) != final(walk.dmlr.text) else "",
        }
        for o in outcomes
    )


def answers(walk: Walk, moment: Moment | None = None) -> pd.DataFrame:
    """Vanilla's answer and DMLR's in full, with their verdicts; between them that from a moment's state."""
    both = (("vanilla", walk.vanilla), ("DMLR", walk.dmlr))
    rows = [(name, said.error or said.text, walk.is_right(said)) for name, said in both]
    if moment:
        rows.insert(1, (f"from iteration {moment.iteration}", moment.answer, moment.is_right))
    return pd.DataFrame({"method": f"{name}{RIGHT[right]}", "answer": text} for name, text, right in rows)


def visible(text: str) -> str:
    """A token with its spaces and line breaks made visible."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"


def next_tokens_html(next_tokens: NextTokens, token: int | None = None) -> str:
    """Two columns per think token: its most probable next tokens, escaped, and their probabilities as bars."""
    shown = [t for t in range(len(next_tokens)) if token in (None, t)]
    columns = {}
    for t in shown:
        columns[f"think token {t + 1}", "next"] = [visible(text) for text, _ in next_tokens[t]]
        columns[f"think token {t + 1}", "p"] = [p for _, p in next_tokens[t]]
    table = pd.DataFrame(columns).style.hide(axis="index").hide(axis="columns", level=1)
    for t in shown:
        shade = f"{token_colour(t)}80"  # half transparent: the number stands on it
        table.bar(subset=[(f"think token {t + 1}", "p")], color=shade, vmin=0, vmax=1)
    return table.format(precision=3, escape="html").to_html()
