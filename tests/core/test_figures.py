"""Circuitsvis without a network: deterministic, escaped, checked."""

import circuitsvis as cv
import matplotlib
import numpy as np
import pytest
import torch

from glassbox_utils.core import figures

TOKENS = ["<s>", " the", "</script>"]


def heads(n=2, size=3):
    pattern = torch.rand(n, size, size, generator=torch.Generator().manual_seed(0)).tril()
    return pattern / pattern.sum(-1, keepdim=True)


def test_a_figure_is_small_deterministic_and_asks_for_nothing():
    made = [figures.figure_html(figures.attention_heads(TOKENS, heads())) for _ in range(2)]
    assert made[0] == made[1]
    assert len(made[0]) < 10_000
    for address in ("http://", "https://", "unpkg"):
        assert address not in made[0]


def test_tokens_cannot_break_the_page():
    html = figures.figure_html(figures.attention_heads(TOKENS, heads()))
    assert "</script>" not in html.split('application/json">')[1].split("</script>")[0]
    coloured = figures.figure_html(figures.colored_tokens(TOKENS, torch.tensor([0.0, 0.5, 1.0])))
    assert "&lt;s&gt;" in coloured


def test_wrong_shapes_are_errors_and_not_empty_figures():
    with pytest.raises(ValueError, match="remove the batch dimension"):
        figures.figure_html(cv.attention.attention_heads(tokens=TOKENS, attention=heads()[None]))
    with pytest.raises(ValueError, match="3 tokens but 2 values"):
        figures.figure_html(cv.tokens.colored_tokens(TOKENS, [0.1, 0.2]))


def test_the_page_has_one_loader():
    page = figures.page(*[figures.attention_heads(TOKENS, heads())] * 3)
    assert page.count("DecompressionStream") == 1 and page.count("glassbox-figure") >= 3
    assert len(page) < 600_000


def test_numbers_are_rounded_and_nan_is_null():
    props = figures.spec(cv.tokens.colored_tokens(["a", "b"], [0.123456, float("nan")]))["props"]
    assert props["values"] == [0.123, None]


def test_every_plot_draws():
    matplotlib.use("Agg")
    figures.style()
    pattern = heads(6).view(2, 3, 3, 3)
    for figure in (
        figures.thumbnails(pattern, "t"),
        figures.pattern_grid(TOKENS, pattern[0], list("abc"), "t"),
        figures.mosaic({"x": torch.rand(4, 3), "y": torch.rand(4, 3)}, "t", "score"),
        figures.mosaic({"x": torch.randn(4, 3)}, "t", "gap", diverging=True),
    ):
        figure.canvas.draw()
        assert np.asarray(figure.canvas.buffer_rgba()).std() > 0
