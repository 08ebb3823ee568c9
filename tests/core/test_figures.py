"""Circuitsvis without a network: deterministic, escaped, checked."""

import base64
import io
import json
import re

import circuitsvis as cv
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from glassbox_utils.core import figures, session

TOKENS = ["<s>", " the", "</script>"]


def heads(n=2, size=3):
    pattern = torch.rand(n, size, size, generator=torch.Generator().manual_seed(0)).tril()
    return pattern / pattern.sum(-1, keepdim=True)


def test_a_figure_is_small_deterministic_and_asks_for_nothing():
    made = [figures.figure_html(figures.attention_heads(TOKENS, heads())) for _ in range(2)]
    assert made[0] == made[1]
    assert len(made[0]) < 30_000
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


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: figures.attention_heads(TOKENS, heads()[None]), r"\[1, 2, 3, 3\], but 3 tokens need \[heads, 3, 3\]"),
        (lambda: figures.attention_heads(TOKENS, heads()[0]), r"shape \[3, 3\]"),
        (lambda: figures.attention_heads(TOKENS[:2], heads()), r"2 tokens need \[heads, 2, 2\]"),
        (lambda: figures.attention_heads([], heads()), r"tokens is \[\]"),
        (lambda: figures.attention_heads("abc", heads()), r"tokens is 'abc'. Allowed: a list"),
        (lambda: figures.attention_heads([1, 2, 3], heads()), r"tokens is \[1, 2, 3\]"),
        (lambda: figures.attention_heads(TOKENS, heads(0)), r"shape \[0, 3, 3\]"),
        (lambda: figures.attention_heads(TOKENS, heads(), ["a"]), r"1 names for 2 heads"),
        (lambda: figures.all_heads(TOKENS, heads()), r"need \[layers, heads, 3, 3\]"),
        (lambda: figures.pattern_grid(TOKENS, heads(), ["a", "b", "c"], "t"), r"3 names for 2 heads"),
        (lambda: figures.colored_tokens(TOKENS, torch.rand(2)), r"3 tokens but values of shape \[2\]"),
        (lambda: figures.colored_tokens([], torch.rand(0)), r"0 tokens"),
        (lambda: figures.colored_tokens(TOKENS, torch.rand(3), float("nan")), r"maximum is nan"),
        (lambda: figures.colored_tokens(TOKENS, torch.rand(3), 0), r"maximum is 0"),
        (lambda: figures.mosaic({}, "t", "score"), r"Allowed: at least one table"),
        (lambda: figures.mosaic({"x": torch.rand(3)}, "t", "score"), r"'x': \[3\]"),
        (lambda: figures.mosaic({"x": torch.rand(4, 3)}, "t", "score", limit=-1), "limit is -1"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_drawn(draw, said):
    with pytest.raises(figures.FigureError, match=said):
        draw()


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 1.5, "1", True, None])
def test_a_seed_that_numpy_would_not_take_is_refused_before_anything_is_set(seed):
    before = torch.get_rng_state()
    with pytest.raises(session.SessionError, match=r"seed is .*Allowed: a whole number from 0 to 4294967295"):
        session.setup(seed)
    assert torch.equal(before, torch.get_rng_state())


def test_other_numbers_that_are_none():
    for call in (lambda: session.setup(0, 0), lambda: session.timed(len, 0)):
        with pytest.raises(session.SessionError, match=r"is 0\. Allowed: a whole number from 1"):
            call()


def test_of_many_heads_one_sheet_is_kept_and_two_decimals():
    """270 small pictures with their markup weighed more than the numbers that they show."""
    pattern = heads(60, 13).view(6, 10, 13, 13)
    made = figures.figure_html(figures.all_heads(list("abcdefghijklm"), pattern))
    assert made.count("<img ") == 1 and "60 heads from 0.0 to 5.9, 18 in a row" in made
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)', made)[1])))
    assert picture.size == (18 * 15 * 3, 4 * 15 * 3) and len(made) < 1_100 * 60
    weights = json.loads(re.search(r'json">(.*?)</script>', made)[1])["props"]["attention"]
    assert torch.allclose(torch.tensor(weights).view(6, 10, 13, 13), pattern, atol=0.006)
    assert {round(100 * x, 6) % 1 for x in np.ravel(weights)} == {0}


def test_a_light_picture_is_the_same_picture():
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    figures.style()
    figure = figures.mosaic({"x": torch.rand(4, 3), "y": torch.rand(4, 3)}, "t", "score")
    figure.axes[0].plot(0, 0, ".", color=figures.ORANGE)  # a colour that hardly any pixel has
    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    heavy, light = (Image.open(io.BytesIO(x)) for x in (buffer.getvalue(), figures.light(buffer.getvalue())))
    off = np.asarray(heavy.convert("RGB")).astype(int) - np.asarray(light.convert("RGB"))
    assert np.abs(off).max() <= 12 and len(figures.light(buffer.getvalue())) < 0.6 * len(buffer.getvalue())


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
        figures.mosaic({"x": torch.rand(4, 3) / 2, "y": torch.rand(4, 3)}, "t", "score", limit=1.0),
    ):
        figure.canvas.draw()
        assert np.asarray(figure.canvas.buffer_rgba()).std() > 0


def test_a_plot_says_what_it_shows_to_those_who_do_not_see_it():
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    assert figures.alt_text(figure) == "A plot without a title."
    axis.plot([1, 2], label="a line")
    axis.set_title("One goes\nup", loc="left")
    axis.set(xlabel="time (s)", ylabel="nats")
    assert figures.alt_text(figure) == "One goes up; across: time (s); up: nats; lines: a line"
    plt.close(figure)
