"""Live panels: what can't be shown is said in the panel, before anything is computed."""

import math

import pytest

from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import ModelError
from glassbox_utils.lab import panels
from glassbox_utils.saes.clamping import ClampError
from glassbox_utils.steering.vectors import SteeringError


@pytest.fixture()
def computed(monkeypatch):
    """Lengths of the texts whose patterns were computed; nothing is displayed."""
    import IPython.display

    monkeypatch.setattr(IPython.display, "display", lambda *a, **k: None)
    texts, real = [], panels.attention
    monkeypatch.setattr(panels, "attention", lambda model, text: texts.append(len(text)) or real(model, text))
    return texts


def test_a_long_text_is_refused_before_its_patterns_are_computed(llama, computed, capsys):
    panel = panels.attention_panel(llama, "the key is in the box")
    assert len(computed) == 1
    panel.children[0].value = "the key is in the box " * 9
    assert len(computed) == 1 and f"this view draws at most {panels.MAX_TOKENS}. Shorten it." in capsys.readouterr().out
    panel.children[0].value = "the box"
    panel.children[1].value = 1
    assert len(computed) == 2, "a text is computed once for all layers"


@pytest.mark.parametrize("layer", [99, -99, "1", True])
def test_a_layer_that_is_not_there_is_refused(llama, computed, layer):
    with pytest.raises(ModelError, match=r"has no layer"):
        panels.attention_panel(llama, "the key", layer)
    assert not computed


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, "1", True, None])
def test_a_strength_that_no_slider_has_is_refused(llama, alpha):
    with pytest.raises(SteeringError, match=r"alpha is .*Allowed: a positive, finite number"):
        panels.steering_panel(llama, None, alpha)


def test_a_concept_and_a_strength_are_needed(llama):
    with pytest.raises(ClampError, match=r"no concept to choose from"):
        panels.clamp_panel(llama, {})
    for strength in (-1.0, 13.0, math.nan):
        with pytest.raises(ClampError, match=r"strength is .*Allowed: 0 to max_strength, which is 12"):
            panels.clamp_panel(llama, {"bridge": 3}, strength=strength)


def test_an_error_is_text_in_the_panel(llama, monkeypatch):
    def refuse(*_, **__):
        raise GlassboxError("The prompt <b>is</b> too long.")

    monkeypatch.setattr(panels, "steer", refuse)
    panel = panels.steering_panel(llama, None, 0.5)
    assert panel.children[2].value == "The prompt &lt;b&gt;is&lt;/b&gt; too long."
