"""Live panels: ipywidgets that answer while the reader types. Each shows plain figures, so a saved page keeps them."""

import asyncio
import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from glassbox_utils.attention.patterns import attention
from glassbox_utils.core import figures, pages
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model, ModelError, check_layer
from glassbox_utils.core.text import chat, generate, tokenize
from glassbox_utils.saes import clamping
from glassbox_utils.steering.apply import steer
from glassbox_utils.steering.vectors import SteeringError

TEMPLATES = Path(__file__).parent / "templates"

MAX_TOKENS = 48
"""a figure with more tokens is unreadable, and its data grow with the square"""


def attention_panel(model: Model, text: str, layer: int = 0) -> Any:
    """Type a sentence, move the layer: every head of the layer is drawn at once."""
    import ipywidgets
    from IPython.display import display

    sentence = ipywidgets.Text(text, description="sentence", layout={"width": "95%"}, continuous_update=False)
    chosen = ipywidgets.IntSlider(
        check_layer(model, layer), 0, model.n_layers - 1, description="layer", continuous_update=False
    )
    view = ipywidgets.Output()
    patterns: dict[str, Any] = {}

    def draw(_: Any = None) -> None:
        if sentence.value not in patterns:
            _check_length(model, sentence.value)
            patterns.clear()
            patterns[sentence.value] = attention(model, sentence.value)
        tokens, pattern = patterns[sentence.value]
        names = [f"{chosen.value}.{head}" for head in range(model.n_heads)]
        display(figures.attention_heads(tokens, pattern[chosen.value], names))

    return _live(view, draw, sentence, chosen)


def _check_length(model: Model, text: str) -> None:
    """ModelError for more tokens than can be drawn, before any pattern is computed."""
    if (n := int(tokenize(model, text).attention_mask.sum())) > MAX_TOKENS:
        raise ModelError(f"The sentence has {n} tokens; this view draws at most {MAX_TOKENS}. Shorten it.")


def comparison_html(
    model: Model, what: clamping.What, prompt: str, answers: Sequence[str], titles: Sequence[str]
) -> str:
    """Answers side by side, each token shaded by the feature's activation when the unclamped model reads the answer."""
    shown = []
    for title, answer in zip(titles, answers, strict=True):
        tokens, values = clamping.activations_in(model, what, answer) if answer.strip() else ([], torch.zeros(0))
        read = list(zip(tokens, values.tolist(), strict=True))[1:]  # the first token is BOS
        shown.append({"title": title, "tokens": read})
    return pages.render(TEMPLATES / "comparison.html", prompt=prompt, answers=shown)


def clamp_panel(
    model: Model,
    concepts: Mapping[str, clamping.What],
    prompt: str = "Who are you?",
    strength: float = 3.0,
    max_strength: float = 12.0,
    max_new_tokens: int = 40,
) -> Any:
    """Pick a concept, drag its strength: the answer without and with the clamp, token by token, stopped at any time.

    The tokens are written between the kernel's other work, so sliders, the stop button and other cells stay usable.
    """
    import ipywidgets

    if not concepts:
        raise clamping.ClampError("There is no concept to choose from. Give at least one: {name: what to clamp}.")
    if not 0 <= strength <= max_strength:
        raise clamping.ClampError(f"strength is {strength}. Allowed: 0 to max_strength, which is {max_strength}.")
    concept = ipywidgets.Dropdown(options=list(concepts), description="concept")
    asked = ipywidgets.Text(prompt, description="prompt", layout={"width": "70%"}, continuous_update=False)
    dial = ipywidgets.FloatSlider(strength, min=0, max=max_strength, step=0.5, description="strength",
                                  continuous_update=False)  # fmt: skip
    stop = ipywidgets.Button(description="stop", button_style="warning")
    state, view = ipywidgets.Label("", layout={"width": "20em"}), ipywidgets.HTML()
    current: dict[str, Any] = {"run": 0}

    async def write(run: int) -> None:
        what, amount = concepts[concept.value], float(dial.value) or None
        titles = ["unclamped", f"{concept.value} held at {amount:g} x its natural size" if amount else "unclamped"]
        ids: list[list[int]] = [[], []]
        try:
            asks = [chat(model, asked.value)] * 2
            for ids in clamping.stream(model, asks, [None, what], [None, amount], max_new_tokens):
                texts = model.tokenizer.batch_decode(ids)
                view.value = pages.render(TEMPLATES / "writing.html", texts=texts)
                state.value = f"writing, token {len(ids[1])}"
                await asyncio.sleep(0.01)  # the kernel's other messages come first: a moved slider, a pressed button
                if current["run"] != run:
                    break
            if any(ids):
                view.value = comparison_html(model, what, asked.value, model.tokenizer.batch_decode(ids), titles)
            if current["run"] == run:
                state.value = "done"
            elif current["run"] == -run:
                state.value = "stopped"
        except GlassboxError as error:
            state.value = str(error)

    def start(_: Any = None) -> None:
        current["run"] = abs(current["run"]) + 1
        task = write(current["run"])
        try:
            current["task"] = asyncio.get_running_loop().create_task(task)
        except RuntimeError:  # no kernel, no event loop
            asyncio.run(task)

    def halt(_: Any = None) -> None:
        current["run"] = -abs(current["run"])

    for control in (concept, asked, dial):
        control.observe(start, names="value")
    stop.on_click(halt)
    start()
    return ipywidgets.VBox([ipywidgets.HBox([concept, asked]), ipywidgets.HBox([dial, stop, state]), view])


def steering_panel(
    model: Model, direction: Any, alpha: float, prompt: str = "How was your weekend?", max_new_tokens: int = 30
) -> Any:
    """Type a prompt, drag the dial: the answers at minus, zero and plus, written in one batch.

    ``direction`` and ``alpha`` as in ``gb.steer``; the slider reaches twice ``alpha``.
    """
    import ipywidgets

    if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
        raise SteeringError(f"alpha is {alpha!r}. Allowed: a positive, finite number; the panel shows minus alpha too.")
    asked = ipywidgets.Text(prompt, description="prompt", layout={"width": "70%"}, continuous_update=False)
    dial = ipywidgets.FloatSlider(alpha, min=0, max=2 * alpha, step=alpha / 10, description="strength α",
                                  readout_format=".3f", continuous_update=False)  # fmt: skip
    view = ipywidgets.HTML()

    def show(_: Any = None) -> None:
        if not asked.value.strip():
            view.value = "Write a prompt first."
            return
        values = [-dial.value, 0.0, dial.value]
        view.value = "thinking…"
        try:
            with steer(model, direction, values):
                texts = generate(model, [chat(model, asked.value)] * 3, max_new_tokens)
        except GlassboxError as error:
            view.value = html.escape(str(error))
            return
        answers = [(v, t.strip()) for v, t in zip(values, texts, strict=True)]
        view.value = pages.render(TEMPLATES / "steering.html", answers=answers)

    for control in (asked, dial):
        control.observe(show, names="value")
    show()
    return ipywidgets.VBox([asked, dial, view])


def _live(view: Any, draw: Callable[..., None], *controls: Any) -> Any:
    """Redraw into ``view`` when a control changes; a mistake is shown as its message, not as a traceback."""
    import ipywidgets

    def refresh(_: Any = None) -> None:
        view.clear_output(wait=True)
        with view:
            try:
                draw()
            except GlassboxError as error:
                print(error)

    for control in controls:
        control.observe(refresh, names="value")
    refresh()
    return ipywidgets.VBox([*controls, view])
