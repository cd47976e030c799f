"""What the walkthrough shows of a moment or an outcome: words, tables, HTML and what its figures draw. Pure functions.

Every text of a model or a user is escaped. Numbers of think tokens, rows and columns begin with one, as people count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup

from dmlr.judge.extract import last_boxed
from dmlr.look.figures import Heat
from dmlr.look.walk import Moment, NextTokens, Walk
from dmlr.look.what_if import Change, Outcome
from dmlr.show.plots import TOKEN_COLOURS, Grid

RIGHT = {True: "✓", False: "✗", None: ""}
_COLUMNS = 4  # think tokens in a table; more would not fit a page


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
        f"Iteration {moment.iteration}, {state}: reward {moment.reward:.5f}, best so far {moment.best:.5f}. "
        f"Attention of {who}. Patches: {where or 'none'}."
    )


def headline(walk: Walk) -> str:
    """What came of the question, in a sentence or three."""
    reasoning, kept = walk.dmlr.reasoning, sum(m.accepted for m in walk.moments)
    first = walk.moments[0]
    verdicts = [_judged(walk.verdict(answer)) for answer in (walk.vanilla, walk.dmlr)]
    told = [
        f"Vanilla answers {final(walk.vanilla.text)}{verdicts[0]}; behind think tokens as they come the answer is "
        f"{final(first.answer)}{_judged(first.is_right)}, and after DMLR {final(walk.dmlr.text)}{verdicts[1]}."
    ]
    if reasoning is not None:
        told.append(
            f"The reward rose from {reasoning.start_reward:.4f} to {reasoning.best_reward:.4f} by iteration "
            f"{reasoning.best_step} of {len(reasoning.steps)}; of the states tried {kept} raised it, and the answer "
            f"comes from the last of them, with {sum(map(len, reasoning.patches))} patches."
        )
    turns = [m.iteration for m, last in zip(walk.moments[1:], walk.moments, strict=False) if m.answer != last.answer]
    told.append(
        f"The answer changes in iteration {', '.join(map(str, turns))}." if turns else "No iteration changes it."
    )
    return " ".join(told)


def reading(walk: Walk, outcomes: Sequence[Outcome]) -> str:
    """What came out, counted: how many states and changes lead to another answer, what the highest reward is worth."""
    said = [final(m.answer) for m in walk.moments[1:]]
    answer, verdict = final(walk.dmlr.text), walk.verdict(walk.dmlr)
    kept = sum(m.accepted for m in walk.moments)
    others, changed = sum(s != answer for s in said), sum(final(o.answer) != answer for o in outcomes)
    lines = [
        f"DMLR's answer: {answer}{_judged(verdict)}.",
        f"States tried: {len(said)}; kept: {kept}; with another answer: {others}.",
        f"Changes tried: {sum(o.change != Change() for o in outcomes)}; with another answer: {changed}.",
    ]
    if outcomes:
        top = max(outcomes, key=lambda o: o.reward)
        name = describe(top.change, walk.encoded.patch_grid)
        lines.append(
            f"The highest reward among them, {top.reward:.5f} ({name}): {final(top.answer)}{_judged(top.is_right)}."
        )
    return "\n".join(lines)


def _judged(right: bool | None) -> str:
    return {True: " (right)", False: " (wrong)", None: ""}[right]


def brightness(limit: float) -> str:
    """What the brightness of a picture means; nothing without a picture."""
    return f"An image token as bright as in the picture has {limit:.2f} of a think token's attention." if limit else ""


# what figures draw


def heat(moment: Moment, grid: Grid, token: int | None = None, title: str = "") -> Heat:
    """Attention on the first image's grid, of one think token or their mean, with the patches tried."""
    count = grid[0] * grid[1]
    rows = moment.attention[:, :count].numpy()
    patches = [
        [p for p in patches if p < count] if token in (None, t) else [] for t, patches in enumerate(moment.patches)
    ]
    return Heat(rows.mean(axis=0) if token is None else rows[token], patches, title, moment.accepted)


def limit(moments: Sequence[Moment], grid: Grid, token: int | None = None) -> float:
    """The largest attention that any of these moments shows: one scale for all of them."""
    return max((float(np.max(heat(m, grid, token).values, initial=0)) for m in moments), default=0.0)


def curve(moments: Sequence[Moment]) -> list[tuple[float, float, bool]]:
    """Per iteration: reward of the state tried, best so far, kept."""
    return [(m.reward, m.best, m.accepted) for m in moments]


def chosen(moments: Sequence[Moment], count: int = 8) -> list[Moment]:
    """At most `count` moments to print: the start, the last, where the answer changes, the best; then evenly spread."""
    last = len(moments) - 1
    best = max((m.iteration for m in moments if m.accepted), default=0)
    turns = [t for t in range(1, last + 1) if moments[t].answer != moments[t - 1].answer]
    even = [round(i * last / max(count - 1, 1)) for i in range(count)]
    wanted = list(dict.fromkeys([0, last, best, *turns, *even]))[:count]
    return [moments[t] for t in sorted(wanted)]


# tables


def moments_table(walk: Walk, top: int = 2) -> pd.DataFrame:
    """A row per iteration: reward, kept or not, patches, next tokens of the first think tokens, the answer."""
    rows = []
    for m in walk.moments:
        sigma = f"{100 * m.sigma / walk.vlm.embedding_rms:.0f} %" if m.sigma else "–"
        row = {"iteration": m.iteration, "σ": sigma, "reward": f"{m.reward:.4f}", "kept": "✓" if m.accepted else ""}
        row |= {"patches": sum(map(len, m.patches))}
        for t, tokens in enumerate(m.next_tokens[:_COLUMNS]):
            row[f"τ{t + 1}"] = " ".join(f"“{visible(text)}”\u00a0{p:.2f}" for text, p in tokens[:top])
        rows.append(row | {"answer": f"{final(m.answer)} {RIGHT[m.is_right]}".rstrip()})
    return pd.DataFrame(rows)


def answers_table(walk: Walk) -> pd.DataFrame:
    """Every different answer once, in full, with the iterations from whose states it was decoded."""
    where: dict[str, list[Moment]] = {}
    for m in walk.moments:
        where.setdefault(m.answer, []).append(m)
    rows = []
    for answer, moments in where.items():
        iterations = ", ".join(str(m.iteration) for m in moments)
        rows.append({"iterations": iterations, "answer": answer, "right": RIGHT[moments[0].is_right]})
    return _judged_table(walk, rows)


def outcomes_table(walk: Walk, outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A row per what-if; its answer is compared with DMLR's as it was."""
    rows = []
    for o in outcomes:
        row = {"what if": describe(o.change, walk.encoded.patch_grid), "patches": sum(map(len, o.patches))}
        row |= {"reward": f"{o.reward:.5f}", "answer": final(o.answer)}
        row |= {"changed": "yes" if final(o.answer) != final(walk.dmlr.text) else ""}
        rows.append(row | {"right": RIGHT[o.is_right]})
    return _judged_table(walk, rows)


def both_answers(walk: Walk) -> pd.DataFrame:
    """Vanilla's answer and DMLR's in full, with verdicts where there is a truth."""
    said = {"vanilla": walk.vanilla, "DMLR": walk.dmlr}
    rows = [
        {"method": name, "answer": answer.error or answer.text, "right": RIGHT[walk.verdict(answer)]}
        for name, answer in said.items()
    ]
    return _judged_table(walk, rows)


def _judged_table(walk: Walk, rows: list[dict]) -> pd.DataFrame:
    """Without the verdicts where there is no truth."""
    return pd.DataFrame(rows).drop(columns=[] if walk.example.solution else "right")


# HTML


def visible(text: str) -> str:
    """A token with its spaces and line breaks made visible."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"


def next_tokens_html(next_tokens: NextTokens, token: int | None = None) -> str:
    """A column per think token: its most probable next tokens as bars."""
    bar = Markup(
        '<div style="display:flex;align-items:center;gap:.4em;line-height:1.5">'
        '<code style="width:6em;overflow:hidden;text-overflow:ellipsis;white-space:pre">{}</code>'
        '<span style="width:5em"><span style="display:block;height:.7em;width:{}%;background:{}"></span></span>'
        "<span>{}</span></div>"
    )
    columns = Markup("").join(
        Markup('<div><b style="color:{}">think token {}</b>{}</div>').format(
            shade := TOKEN_COLOURS[t % len(TOKEN_COLOURS)],
            t + 1,
            Markup("").join(bar.format(visible(text), f"{100 * p:.1f}", shade, f"{p:.3f}") for text, p in tokens),
        )
        for t, tokens in enumerate(next_tokens)
        if token in (None, t)
    )
    return str(
        Markup('<div style="display:flex;flex-wrap:wrap;gap:.6em 1.6em;font-size:12px">{}</div>').format(columns)
    )


def answers_html(walk: Walk, moment: Moment) -> str:
    """Vanilla, the answer from this moment's state, and DMLR's, side by side with their verdicts."""
    said = {
        "vanilla": (walk.vanilla.error or walk.vanilla.text, walk.verdict(walk.vanilla)),
        f"from iteration {moment.iteration}": (moment.answer, moment.is_right),
        "DMLR": (walk.dmlr.error or walk.dmlr.text, walk.verdict(walk.dmlr)),
    }
    verdicts = {True: "✓ right", False: "✗ wrong", None: ""}
    cells = Markup("").join(
        Markup(
            '<div style="flex:1 1 13em;min-width:0"><b>{}</b> <span>{}</span><div style="white-space:pre-wrap;'
            'overflow-wrap:anywhere;line-height:1.4;max-height:14em;overflow-y:auto">{}</div></div>'
        ).format(name, verdicts[right], text)
        for name, (text, right) in said.items()
    )
    return str(Markup('<div style="display:flex;flex-wrap:wrap;gap:.6em 1.6em;font-size:13px">{}</div>').format(cells))
