"""Live panels: ipywidgets that answer while the reader types. Each shows plain figures, so a saved page keeps them."""

from collections.abc import Callable
from typing import Any

from glassbox_utils import figures
from glassbox_utils.attention import attention
from glassbox_utils.models import Model, ModelError

MAX_TOKENS = 48
"""a figure with more tokens is unreadable, and its data grow with the square"""


def attention_panel(model: Model, text: str, layer: int = 0) -> Any:
    """Type a sentence, move the layer: every head of the layer is drawn at once."""
    import ipywidgets
    from IPython.display import display

    sentence = ipywidgets.Text(text, description="sentence", layout={"width": "95%"}, continuous_update=False)
    chosen = ipywidgets.IntSlider(layer, 0, model.n_layers - 1, description="layer", continuous_update=False)
    view = ipywidgets.Output()
    patterns: dict[str, Any] = {}

    def draw(_: Any = None) -> None:
        if sentence.value not in patterns:
            patterns.clear()
            patterns[sentence.value] = attention(model, sentence.value)
        tokens, pattern = patterns[sentence.value]
        if len(tokens) > MAX_TOKENS:
            raise ModelError(
                f"The sentence has {len(tokens)} tokens; this view draws at most {MAX_TOKENS}. Shorten it."
            )
        names = [f"{chosen.value}.{head}" for head in range(model.n_heads)]
        display(figures.attention_heads(tokens, pattern[chosen.value], names))

    return _live(view, draw, sentence, chosen)


def _live(view: Any, draw: Callable[..., None], *controls: Any) -> Any:
    """Redraw into ``view`` when a control changes; a mistake is shown as its message, not as a traceback."""
    import ipywidgets

    def refresh(_: Any = None) -> None:
        view.clear_output(wait=True)
        with view:
            try:
                draw()
            except ModelError as error:
                print(error)

    for control in controls:
        control.observe(refresh, names="value")
    refresh()
    return ipywidgets.VBox([*controls, view])
