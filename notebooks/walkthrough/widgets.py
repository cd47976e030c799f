"""The walkthrough as widgets in JupyterLab: choose, move, compare, ask what if. It only wires.

What is shown comes from view.py and show/figures.py, what is computed from walk.py and what_if.py; a report
shows the same content without widgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import ipywidgets as ipw
from markupsafe import Markup
from PIL import Image

from dmlr.data.examples import Example
from dmlr.data.images import ImageFile, open_image
from dmlr.show import figures
from dmlr.show.page import data_uri, table
from notebooks.walkthrough import view
from notebooks.walkthrough.walk import Walk, explore
from notebooks.walkthrough.what_if import Change, try_changes

ALL = -1  # in the selector of think tokens
WHOLE = {"description_width": "initial"}  # of a label: it is not cut


class Explorer:
    """Widgets around one Walk. `widget` is what is displayed, `walk` the question that it shows now."""

    def __init__(self, walk: Walk, examples: Sequence[Example] = ()):
        self.examples = list(examples)
        self.status = ipw.HTML()
        # choose
        options = [(f"{i} · {e.question[:90]}", i) for i, e in enumerate(self.examples)]
        here = self.examples.index(walk.example) if walk.example in self.examples else None
        self.example = ipw.Dropdown(options=options, value=here, description="example", layout={"width": "auto"})
        self.upload = ipw.FileUpload(accept="image/*", description="image")
        self.question = ipw.Text(placeholder="a question of your own", layout={"flex": "1"})
        self.ask = ipw.Button(description="Ask")
        # move
        self.slider = ipw.IntSlider(description="iteration", layout={"flex": "1"})
        self.play = ipw.Play(interval=700, show_repeat=False)
        ipw.jslink((self.play, "value"), (self.slider, "value"))
        self.token = ipw.ToggleButtons(description="think token", style=WHOLE | {"button_width": "auto"})
        self.picture, self.tokens, self.answers = ipw.HTML(), ipw.HTML(), ipw.HTML()
        # what if
        self.drop = ipw.SelectMultiple(description="leave out patches", style=WHOLE)
        self.freeze = ipw.SelectMultiple(description="freeze", style=WHOLE)
        self.seed = ipw.BoundedIntText(description="seed", min=0, max=2**31 - 1, style=WHOLE)
        self.wonder = ipw.Button(description="What if")
        self.outcomes = ipw.HTML()
        self.show(walk)
        self.example.observe(self._reported(self._choose), "value")
        self.ask.on_click(self._reported(self._ask))
        for moved in (self.slider, self.token):
            moved.observe(self._reported(self.draw), "value")
        self.wonder.on_click(self._reported(self._wonder))
        rows = [
            self.example,
            ipw.HBox([self.upload, self.question, self.ask]),
            self.status,
            ipw.HBox([self.play, self.slider]),
            *(self.token, self.picture, self.tokens, self.answers),
            ipw.HBox([self.drop, self.freeze, self.seed, self.wonder], layout={"flex_flow": "wrap"}),
            self.outcomes,
        ]
        self.widget = ipw.VBox(rows)

    def show(self, walk: Walk) -> None:
        """Another question: all widgets are set to it."""
        self.walk, self.tried = walk, []
        self.drawn = cache(self._drawn)  # moving back costs nothing
        self.slider.max = self.play.max = len(walk.moments) - 1
        self.slider.value = 0
        tokens = range(walk.config.num_thought_tokens)
        self.token.options = [("all", ALL), *((str(t + 1), t) for t in tokens)]
        self.token.value = ALL
        self.drop.options = [
            (f"{t + 1}: {view.place(patch, walk.grid)}", (t, patch))
            for t, patches in enumerate(walk.dmlr.reasoning.patches)
            for patch in patches
        ]
        self.freeze.options = [(f"think token {t + 1}", t) for t in tokens]
        self.seed.value = walk.config.seed
        self.outcomes.value = ""
        self.draw()
        self.say(walk.example.question + (f" — truth: {walk.example.solution}" if walk.example.solution else ""))

    def draw(self) -> None:
        """The moment of the slider."""
        moment, token = self.walk.moments[self.slider.value], self.token.value
        token = None if token == ALL else token
        self.picture.value = self.drawn(moment.iteration, token)
        self.tokens.value = view.next_tokens_html(moment.next_tokens, token)
        self.answers.value = table(view.answers(self.walk, moment))

    def _drawn(self, iteration: int, token: int | None) -> str:
        walk, grid, heats = self.walk, self.walk.grid, [view.heat(m, token) for m in self.walk.moments]
        image = walk.question.images[0] if walk.question.images else None
        limit, curve = figures.brightest(heats, grid), view.curve(walk.moments)
        figure = figures.moment(image, grid, heats[iteration], curve, iteration, limit)
        caption = view.caption(walk.moments[iteration], grid, token)
        html = '<img src="{}" alt="{}" style="max-width:100%;width:760px"><div style="line-height:1.4">{}</div>'
        return str(Markup(html).format(data_uri(figure), caption, caption))

    def say(self, text: str, bad: bool = False) -> None:
        """The status line."""
        style = "color:#a8361c" if bad else "font-weight:600"
        self.status.value = str(Markup('<div role="status" style="{};line-height:1.4">{}</div>').format(style, text))

    def _reported(self, handler: Callable[[], None]) -> Callable:
        """Errors of a button or a slider become the status line: JupyterLab would hide them in its log."""

        def handle(_: object) -> None:
            try:
                handler()
            except Exception as error:
                self.say(f"{type(error).__name__}: {error}", bad=True)

        return handle

    def _choose(self) -> None:
        if self.example.value is not None:
            self.upload.value = ()  # the next question is about the image shown
            example = self.examples[self.example.value]
            self._explore(example, [open_image(source) for source in example.images])

    def _ask(self) -> None:
        text = self.question.value.strip()
        if not text:
            raise ValueError("type a question first; with an image of your own, or about the one shown")
        images = self.walk.question.images
        if self.upload.value:
            sent = self.upload.value[-1]
            images = [open_image(ImageFile(sent["name"], bytes(sent["content"])))]
        self.example.value = None
        self._explore(Example(row=0, idx=0, question=text, solution=""), images)

    def _wonder(self) -> None:
        seed = None if self.seed.value == self.walk.config.seed else self.seed.value
        change = Change(frozenset(self.drop.value), frozenset(self.freeze.value), seed)
        if change == Change():
            raise ValueError("choose patches to leave out, think tokens to freeze, or another seed first")
        self.tried = [*try_changes(self.walk, [change]), *self.tried]
        self.outcomes.value = table(view.outcomes_table(self.walk, self.tried))

    def _explore(self, example: Example, images: Sequence[Image.Image]) -> None:
        self.say("thinking …")
        self.show(explore(self.walk.vlm, self.walk.config, example, images))
