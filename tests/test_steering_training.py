"""A vector trained on a model's own answers: the reward, what training reaches, going on after a kill."""

import numpy as np
import pytest
import torch
from test_steering import VOCABULARY, build, logits, several

from glassbox_utils import steering, steering_figures, steering_studies, steering_training, style
from glassbox_utils.evaluation import spearman
from glassbox_utils.models import load_model, tokenize
from glassbox_utils.steering import SteeringError

QUESTIONS = [f"w{i} w{i + 5} w{i + 9}" for i in range(1, 13)]


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def valence():
    values = torch.zeros(VOCABULARY)
    values[5:12], values[20:27] = 3.0, -3.0
    return values


def share(model, vector, alpha, valence):
    """Mean valence of the next word after each question, over the whole vocabulary."""
    batch = tokenize(model, QUESTIONS)
    with steering.steer(model, vector, alpha), torch.no_grad():
        last = model.hf(**batch.inputs).logits[:, -1].softmax(-1)
    return float((last @ valence).mean())


def test_the_reward_is_the_expected_change_of_the_compound_score():
    log_probs = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    valence, written = torch.tensor([0.0, 2.0, -1.5, 0.0]), torch.tensor([[1, 3, 2]])
    counted = torch.tensor([[True, True, False]])  # the last token is padding

    def score(words):
        s = sum(float(valence[w]) for w in words)
        return s / (s * s + 15) ** 0.5

    expected = 0.0
    for place in (0, 1):
        other = written[0, 1 - place]
        for word in range(4):
            expected += float(log_probs[0, place, word].exp()) * (score([other, word]) - score([other]))
    found = steering_training.expected_tone(log_probs, written, counted, valence)
    assert found.tolist() == pytest.approx([expected], abs=1e-6)
    wider = torch.cat([log_probs, torch.full((1, 3, 2), -9.0)], -1)  # logits padded beyond the tokenizer's words
    assert steering_training.expected_tone(wider, written, counted, valence).tolist() == found.tolist()


def test_it_moves_words_further_apart_than_where_it_started_and_leaves_the_weights_alone(llama, valence):
    start, before = several(llama), logits(llama)
    options = dict(steps=25, n_questions=8, learning_rate=0.03, new_tokens=4, valence=valence)
    trained = steering_training.train_vector(llama, QUESTIONS, start, 0.5, **options)

    def effect(v):
        return share(llama, v, 0.5, valence) - share(llama, v, -0.5, valence)

    others = [effect(steering.random_vector(start, k)) for k in range(10)]
    assert effect(trained) > effect(start) + 0.2 and effect(trained) > max(others)
    assert trained.layers == start.layers and trained.parts[0].method == "own answers"
    assert all(float(p.vector.norm()) == pytest.approx(1, abs=1e-5) for p in trained.parts)
    assert torch.equal(logits(llama), before)
    assert all(p.requires_grad and p.grad is None for p in llama.hf.parameters())


def test_an_interrupted_training_goes_on_to_the_same_numbers(llama, valence, tmp_path, monkeypatch):
    options = dict(steps=12, n_questions=4, new_tokens=3, valence=valence)
    whole = steering_training.train_vector(llama, QUESTIONS, several(llama), 0.5, **options)

    path, calls, real = tmp_path / "half.pt", [], steering_training.continuations

    def dies(*args):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(steering_training, "continuations", dies)
    with pytest.raises(KeyboardInterrupt):
        steering_training.train_vector(llama, QUESTIONS, several(llama), 0.5, **options, checkpoint=path)
    assert torch.load(path, weights_only=True)["step"] == 10
    monkeypatch.setattr(steering_training, "continuations", real)
    again = steering_training.train_vector(llama, QUESTIONS, several(llama), 0.5, **options, checkpoint=path)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(whole.parts, again.parts, strict=True))
    assert torch.equal(logits(llama), logits(build("llama")))  # and no hook is left of the one that died


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"steps": 0}, {"n_questions": 0}, {"questions": []}])
def test_numbers_that_make_no_sense_are_refused(llama, valence, wrong):
    options = {"questions": QUESTIONS, "alpha": 0.5, "valence": valence} | wrong
    with pytest.raises(SteeringError, match="above zero"):
        steering_training.train_vector(llama, start=several(llama), **options)


def test_a_tokenizer_without_tone_words_is_refused(llama):
    with pytest.raises(SteeringError, match="valence"):
        steering_training.train_vector(llama, QUESTIONS, several(llama), 0.5)


def test_valences_are_those_of_whole_words():
    tokenizer = load_model().tokenizer
    found = steering_training.valences(tokenizer)
    for word, sign in ((" wonderful", 1), (" terrible", -1), (" table", 0)):
        [token] = tokenizer.encode(word, add_special_tokens=False)
        assert float(found[token]) == pytest.approx(style.lexicon().get(word.strip(), 0.0))
        assert sign * float(found[token]) >= abs(sign)
    assert 1000 < int((found != 0).sum()) < 7500


def test_the_second_ruler_agrees_with_people_and_with_what_the_table_says_of_it():
    model = load_model()
    good, bad = (torch.tensor(steering_studies.read_tone(model, side)) for side in steering.pairs("tone", "report"))
    better = good > bad
    assert float(better.float().mean()) >= 0.9
    rho = steering_studies.read_table("steering_ruler")["rank_correlation"]
    assert rho == steering_studies.read_table("steering_tone")["second_ruler"]
    texts, rating = style.human_ratings("products")
    chosen = np.random.default_rng(99).choice(len(texts), 100, replace=False)
    again = spearman(steering_studies.read_tone(model, [texts[i] for i in chosen]), rating[chosen], n_resamples=200).rho
    assert again.low - 0.1 < rho["products"] < again.high + 0.1  # some of the hundred were fitted on


def test_the_second_ruler_reads_stored_answers_as_the_table_says():
    model, row = load_model(), steering_studies.read_table("steering_tone")["rows"][0]
    found = steering_studies.read_tone(model, row["answers"][:40])
    assert np.allclose(found, row["second"][:40], atol=0.02)


def test_the_shipped_vector_is_the_one_the_table_selected():
    table = steering_studies.read_table("steering_layers")
    assert table["training"] == steering_studies.TRAINING
    assert len(steering.prompts("train")) == 75
    shipped, alpha = steering_studies.selected()
    assert (
        shipped.parts[0].method == table["selected"]["recipe"] == "own answers" and alpha == table["selected"]["alpha"]
    )


def test_telling_words_are_counted_and_can_be_left_out():
    answers = {"steer -1": ["A disaster.", "A disaster!"], "steer 0": ["A day.", "A good day."]}
    answers["steer 1"] = ["A wonderful day.", "Good, and a wonderful house."]
    report = steering_figures.Report({"rows": [{"condition": k, "answers": v} for k, v in answers.items()]})
    found = steering_figures.telling_words(report)
    assert found == {"minus": {"disaster": (2, 0)}, "plus": {"wonderful": (2, 0), "good": (1, 1)}}
    left = steering_figures.effect_without(report, ["disaster", "wonderful"])  # "Good" alone is left
    assert left.value == pytest.approx(style.tone(["Good."])[0] / 2, abs=0.01) and left.n == 2
