"""The walkthrough as widgets in JupyterLab: choose, move, compare, ask what if. It only wires.

What is shown comes from view.py and figures.py, what is computed from walk.py and what_if.py;
a report shows the same content without widgets.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps

import ipywidgets as ipw
from markupsafe import Markup
from PIL import Image

from dmlr.data.examples import Example
from dmlr.data.images import ImageError, open_image
from dmlr.look import figures, view
from dmlr.look.walk import Walk, explore
from dmlr.look.what_if import Change, try_changes
from dmlr.show.page import data_uri, table

ALL = -1  # in the selector of think tokens
WIDE = ipw.Layout(width="auto")


def reported(handler: Callable) -> Callable:
    """Errors of a button or a slider become the status line: JupyterLab would hide them in its log."""

    @wraps(handler)
    def handle(self: Explorer, *args) -> None:
        try:
            handler(self, *args)
        except Exception as error:
            self.say(f"{type(error).__name__}: {error}", bad=True)

    return handle


class Explorer:
    """Widgets around one Walk. `widget` is what is displayed, `walk` the question that it shows now."""

    def __init__(self, walk: Walk, examples: Sequence[Example] = ()):
        self.examples = list(examples)
        self.status = ipw.HTML()
        # choose
        options = [(f"{i} · {e.question[:90]}", i) for i, e in enumerate(self.examples)]
        here = self.examples.index(walk.example) if walk.example in self.examples else None
        self.example = ipw.Dropdown(options=options, value=here, description="example", layout=WIDE)
        self.upload = ipw.FileUpload(accept="image/*", description="image")
        self.question = ipw.Text(placeholder="a question of your own", layout=ipw.Layout(flex="1"))
        self.ask = ipw.Button(description="Ask")
        # move
        self.slider = ipw.IntSlider(description="iteration", layout=ipw.Layout(flex="1"))
        self.play = ipw.Play(interval=700, show_repeat=False)
        ipw.jslink((self.play, "value"), (self.slider, "value"))
        self.token = ipw.ToggleButtons(style={"button_width": "auto"})
        self.picture, self.tokens, self.answers = ipw.HTML(), ipw.HTML(), ipw.HTML()
        # what if
        self.drop = ipw.SelectMultiple(layout=ipw.Layout(width="20em", height="7em"))
        self.freeze = ipw.SelectMultiple(layout=ipw.Layout(width="10em", height="7em"))
        self.seed = ipw.BoundedIntText(min=0, max=2**31 - 1, layout=ipw.Layout(width="8em"))
        self.wonder = ipw.Button(description="What if")
        self.outcomes = ipw.HTML()
        self.show(walk)
        self.example.observe(self._choose, "value")
        self.ask.on_click(self._ask)
        self.slider.observe(self._move, "value")
        self.token.observe(self._move, "value")
        self.wonder.on_click(self._wonder)
        self.widget = self._layout()

    def _layout(self) -> ipw.VBox:
        def named(name: str, box: ipw.Widget) -> ipw.VBox:
            return ipw.VBox([ipw.Label(name), box])

        return ipw.VBox(
            [
                self.example,
                ipw.HBox([self.upload, self.question, self.ask]),
                self.status,
                ipw.HBox([self.play, self.slider]),
                ipw.HBox([ipw.Label("think token", layout=ipw.Layout(margin="2px 8px")), self.token]),
                self.picture,
                self.tokens,
                self.answers,
                ipw.HBox(
                    [
                        named("leave out patches", self.drop),
                        named("freeze think tokens", self.freeze),
                        named("seed", self.seed),
                        named("and decode again", self.wonder),
                    ]
                ),
                self.outcomes,
            ]
        )

    def show(self, walk: Walk) -> None:
        """Another question: all widgets are set to it."""
        self.walk, self.drawn, self.tried = walk, {}, []
        grid, length = walk.encoded.patch_grid, walk.config.num_thought_tokens
        last = len(walk.moments) - 1
        self.slider.max = self.play.max = last
        self.slider.value = 0
        self.token.options = [("all", ALL), *((str(t + 1), t) for t in range(length))]
        self.token.value = ALL
        self.drop.options = [
            (f"{t + 1}: {view.place(patch, grid)}", (t, patch))
            for t, patches in enumerate(walk.dmlr.reasoning.patches)
            for patch in patches
        ]
        self.freeze.options = [(f"think token {t + 1}", t) for t in range(length)]
        self.seed.value = walk.config.seed
        self.outcomes.value = ""
        self.say(walk.example.question + (f" — truth: {walk.example.solution}" if walk.example.solution else ""))
        self.draw()

    def draw(self) -> None:
        """The moment of the slider; figures are kept, so that moving back costs nothing."""
        walk, t = self.walk, self.slider.value
        token = None if self.token.value == ALL else self.token.value
        moment, grid = walk.moments[t], walk.encoded.patch_grid
        if (t, token) not in self.drawn:
            image = walk.question.images[0] if walk.question.images else None
            heat, limit = view.heat(moment, grid, token), view.limit(walk.moments, grid, token)
            figure = figures.moment(image, grid, heat, limit, view.curve(walk.moments), t)
            caption = view.caption(moment, grid, token)
            self.drawn[t, token] = Markup(
                '<img src="{}" alt="{}" style="max-width:100%;width:760px"><div style="line-height:1.4">{}</div>'
            ).format(data_uri(figure), caption, caption)
        self.picture.value = str(self.drawn[t, token])
        self.tokens.value = view.next_tokens_html(moment.next_tokens, token)
        self.answers.value = view.answers_html(walk, moment)

    def say(self, text: str, bad: bool = False) -> None:
        """The status line."""
        style = "color:#a8361c" if bad else "font-weight:600"
        self.status.value = str(Markup('<div role="status" style="{};line-height:1.4">{}</div>').format(style, text))

    @reported
    def _move(self, _) -> None:
        self.draw()

    @reported
    def _choose(self, change) -> None:
        if change["new"] is not None:
            self.upload.value = ()  # the next question is about the image shown
            example = self.examples[change["new"]]
            self._explore(example, [open_image(source) for source in example.images])

    @reported
    def _ask(self, _) -> None:
        text = self.question.value.strip()
        if not text:
            raise ValueError("type a question first; with an image of your own, or about the one shown")
        if self.upload.value:
            name, content = self.upload.value[-1]["name"], bytes(self.upload.value[-1]["content"])
            try:
                images = [open_image(Image.open(io.BytesIO(content)))]
            except OSError:
                raise ImageError(f"{name}: not an image in a known format") from None
        else:
            images = self.walk.question.images
        self.example.value = None
        self._explore(Example(row=0, idx=0, question=text, solution=""), images)

    @reported
    def _wonder(self, _) -> None:
        seed = None if self.seed.value == self.walk.config.seed else self.seed.value
        change = Change(frozenset(self.drop.value), frozenset(self.freeze.value), seed)
        if change == Change():
            raise ValueError("choose patches to leave out, think tokens to freeze, or another seed first")
        self.tried = [*try_changes(self.walk, [change]), *self.tried]
        self.outcomes.value = table(view.outcomes_table(self.walk, self.tried))

    def _explore(self, example: Example, images: Sequence[Image.Image]) -> None:
        self.say("thinking …")
        self.show(explore(self.walk.vlm, self.walk.config, example, images))
