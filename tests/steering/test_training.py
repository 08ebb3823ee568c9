"""A vector trained on a model's own answers: the reward, what training reaches, going on after a kill."""

import numpy as np
import pytest
import tokenizers
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from wired import VOCABULARY
from worded import build, logits, several

from glassbox_utils.core import studies
from glassbox_utils.core.devices import result
from glassbox_utils.core.losses import answer_losses
from glassbox_utils.core.models import load_model
from glassbox_utils.core.statistics import spearman
from glassbox_utils.core.text import tokenize
from glassbox_utils.steering import contrast, figures, reward, ruler_study, study, style, training
from glassbox_utils.steering.apply import continuations, steer
from glassbox_utils.steering.vectors import SteeringError, random_vector

QUESTIONS = [f"w{i} w{i + 5} w{i + 9}" for i in range(1, 13)]


@pytest.fixture(scope="module")
def valence():
    values = torch.zeros(VOCABULARY)
    values[5:12], values[20:27] = 3.0, -3.0
    return values


def share(model, vector, alpha, valence):
    """Mean valence of the next word after each question, over the whole vocabulary."""
    batch = tokenize(model, QUESTIONS)
    with steer(model, vector, alpha), torch.no_grad():
        last = result(model.hf(**batch.inputs).logits[:, -1].softmax(-1))
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
    found = reward.expected_tone(log_probs, written, counted, valence)
    assert found.tolist() == pytest.approx([expected], abs=1e-6)
    wider = torch.cat([log_probs, torch.full((1, 3, 2), -9.0)], -1)  # logits padded beyond the tokenizer's words
    assert reward.expected_tone(wider, written, counted, valence).tolist() == found.tolist()


def test_beyond_the_unsteered_answer_the_order_is_worth_more_and_the_two_ends_mirror_each_other():
    log_probs = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    written, counted = torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.bool)
    valence = torch.tensor([0.0, 3.0, -3.0, 0.0])
    tone = 3 / 24**0.5  # of one such word

    def worth(plain, sign, valence=valence):
        return float(reward.expected_tone(log_probs, written, counted, valence, torch.tensor([plain]), sign))

    assert worth(0.0, 1) > worth(-0.9, 1) + 0.1  # there the order is reached whatever is written
    assert worth(tone - 0.01, 1) < worth(tone - 0.5, 1)  # too near to count as beyond
    assert worth(0.3, 1) == pytest.approx(-worth(-0.3, -1, -valence), abs=1e-5)


def test_words_that_people_complain_with_count_at_minus_and_catastrophes_the_wrong_way_at_both_ends():
    tokenizer = load_model().tokenizer
    plus, minus = reward.worded(tokenizer)
    expected = {
        " wonderful": (1, 1), " disappointing": (-1, -1), " boring": (-1, -1), " disaster": (-1, 1), " killed": (-1, 1),
        " hostile": (-1, 0), " table": (0, 0),
    }  # fmt: skip
    for word, signs in expected.items():
        [token] = tokenizer.encode(word, add_special_tokens=False)
        assert (int(plus[token].sign()), int(minus[token].sign())) == signs, word
    complaining = reward.complaining_words()
    assert not complaining & style.CATASTROPHES and 100 < len(complaining) < 500
    assert all(style.lexicon()[word] < 0 for word in complaining)
    assert style.catastrophes(["A disaster!", "It was disappointing.", "Two died."]).tolist() == [True, False, True]


def test_fewer_words_are_complaints_the_more_is_asked_of_them():
    many, clear = reward.complaining_words(2, 1.0), reward.complaining_words(2, 1.0, -1.5)
    assert "no" in many and "no" not in clear and {"awful", "boring", "rude"} <= many
    assert clear < many and reward.complaining_words() < many
    assert all(style.lexicon()[word] <= -1.5 for word in clear) and not many & style.CATASTROPHES


def test_the_likely_order_is_worth_what_one_redrawn_word_changes_and_pulls_most_where_it_is_missing():
    log_probs = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1).requires_grad_()
    valence, written = torch.tensor([0.0, 2.0, -2.0, 0.0, 1.0]), torch.tensor([[1, 1, 2]])
    counted = torch.tensor([[True, True, False]])  # the last token is padding

    def worth(words, plain, sign):
        s = sum(float(valence[w]) for w in set(words))  # a word that is said twice counts once
        beyond = sign * (s / (s * s + 15) ** 0.5 - plain)
        return 1 / (1 + np.exp(-(beyond - reward.MARGIN) / reward.STEP)) + reward.TONE * beyond

    for plain, sign in ((0.0, 1), (0.9, 1), (0.0, -1)):
        redrawn = [
            sum(float(log_probs[0, t, w].detach().exp()) * worth([1, w], plain, sign) for w in range(5)) for t in (0, 1)
        ]
        now = worth([1, 1], plain, sign)
        chance = np.clip(now + sum(r - now for r in redrawn), reward.FLOOR, 1)
        found = reward.likely_order(log_probs, written, counted, valence, torch.tensor([plain]), sign)
        assert found.tolist() == pytest.approx([sum(redrawn) / chance], abs=1e-5)
        [slope] = torch.autograd.grad(found.sum(), log_probs)
        assert sign * float(slope[0, 0, 2]) < 0 and not slope[0, 2].any()


def test_shuffled_valences_are_the_same_numbers_on_other_words():
    valence = torch.stack([torch.arange(8.0), -torch.arange(8.0)])
    mixed = reward.shuffled(valence, 0)
    assert torch.equal(mixed[0], -mixed[1]) and not torch.equal(mixed, valence)
    assert mixed[0, 0] == 0 and torch.equal(mixed[0].sort().values, valence[0])
    assert torch.equal(mixed, reward.shuffled(valence, 0)) and not torch.equal(mixed, reward.shuffled(valence, 1))


def test_it_moves_words_further_apart_than_where_it_started_and_leaves_the_weights_alone(llama, valence):
    start, before = several(llama), logits(llama)
    options = dict(steps=25, n_questions=8, learning_rate=0.03, new_tokens=4, valence=valence)
    trained = training.train_vector(llama, QUESTIONS, start, 0.5, **options)

    def effect(v):
        return share(llama, v, 0.5, valence) - share(llama, v, -0.5, valence)

    others = [effect(random_vector(start, k)) for k in range(10)]
    assert effect(trained) > effect(start) + 0.2 and effect(trained) > max(others)
    assert trained.layers == start.layers and trained.parts[0].method == "own answers"
    assert all(float(p.vector.norm()) == pytest.approx(1, abs=1e-5) for p in trained.parts)
    assert torch.equal(logits(llama), before)
    assert all(p.requires_grad and p.grad is None for p in llama.hf.parameters())


def test_with_the_order_each_answer_is_compared_with_the_unsteered_one(llama, valence):
    start = several(llama)
    options = dict(steps=2, n_questions=4, new_tokens=3, valence=torch.stack([valence, valence]))
    compared = training.train_vector(llama, QUESTIONS, start, 0.5, order=True, **options)
    alone = training.train_vector(llama, QUESTIONS, start, 0.5, **options)
    assert not torch.equal(compared.parts[0].vector, alone.parts[0].vector)
    assert all(p.requires_grad and p.grad is None for p in llama.hf.parameters())


def test_the_two_ends_may_be_pushed_unequally_far(llama, valence):
    options = dict(steps=2, n_questions=4, new_tokens=3, valence=valence, order="likely")
    same, alike, longer = (
        training.train_vector(llama, QUESTIONS, several(llama), alpha, **options).parts[0].vector
        for alpha in (0.5, (0.5, 0.5), (0.5, 0.8))
    )
    assert torch.equal(same, alike) and not torch.equal(same, longer)
    for wrong in ((0.5, 0.0), (0.5, 0.5, 0.5)):
        with pytest.raises(SteeringError, match="alpha"):
            training.train_vector(llama, QUESTIONS, several(llama), wrong, **options)
    with pytest.raises(SteeringError, match=r"order is 'often'\. Allowed"):
        training.train_vector(llama, QUESTIONS, several(llama), 0.5, **(options | {"order": "often"}))


def test_on_given_answers_a_vector_makes_either_side_likelier_at_its_end(llama):
    plus = [(q, f"w{5 + i % 7} w{5 + i % 5}") for i, q in enumerate(QUESTIONS)]
    minus = [(q, f"w{20 + i % 7} w{20 + i % 5}") for i, q in enumerate(QUESTIONS)]
    start, before = several(llama), logits(llama)
    found = training.train_on_answers(llama, plus, minus, start, (0.5, 0.8), steps=30, n_texts=12, learning_rate=0.03)

    def loss(vector):
        with steer(llama, vector, 0.5):
            brighter = answer_losses(llama, *zip(*plus, strict=True))[0].sum()
        with steer(llama, vector, -0.8):
            return brighter + answer_losses(llama, *zip(*minus, strict=True))[0].sum()

    assert loss(found) < min(loss(start), *(loss(random_vector(start, k)) for k in range(5)))
    assert found.layers == start.layers and torch.equal(logits(llama), before)
    assert all(float(p.vector.norm()) == pytest.approx(1, abs=1e-5) for p in found.parts)
    for wrong in ({"steps": 0}, {"n_texts": 0}, {"alpha": (0.5, 0.0)}, {"learning_rate": 0}, {"plus": []}):
        options = {"plus": plus, "minus": minus, "start": start, "alpha": (0.5, 0.5)} | wrong
        with pytest.raises(SteeringError, match="Allowed"):
            training.train_on_answers(llama, **options)


def test_an_interrupted_training_goes_on_to_the_same_numbers(llama, valence, tmp_path, monkeypatch):
    options = dict(steps=12, n_questions=4, new_tokens=3, valence=valence)
    whole = training.train_vector(llama, QUESTIONS, several(llama), 0.5, **options)

    path, calls, real = tmp_path / "half.safetensors", [], continuations

    def dies(*args, **options):
        if not options:  # answers that are sampled; unsteered ones are greedy
            calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(training, "continuations", dies)
    with pytest.raises(KeyboardInterrupt):
        training.train_vector(llama, QUESTIONS, several(llama), 0.5, **options, checkpoint=path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "10"
    monkeypatch.setattr(training, "continuations", real)
    again = training.train_vector(llama, QUESTIONS, several(llama), 0.5, **options, checkpoint=path)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(whole.parts, again.parts, strict=True))
    assert torch.equal(logits(llama), logits(build("llama")))  # and no hook is left of the one that died


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"steps": 0}, {"n_questions": 0}, {"questions": []}])
def test_numbers_that_make_no_sense_are_refused(llama, valence, wrong):
    options = {"questions": QUESTIONS, "alpha": 0.5, "valence": valence} | wrong
    with pytest.raises(SteeringError, match=r"(alpha|steps|n_questions|questions) (is|holds) .*Allowed: a"):
        training.train_vector(llama, start=several(llama), **options)


def test_a_tokenizer_without_tone_words_is_refused(llama):
    with pytest.raises(SteeringError, match="valence"):
        training.train_vector(llama, QUESTIONS, several(llama), 0.5)


def test_valences_are_those_of_whole_words():
    tokenizer = load_model().tokenizer
    found = reward.valences(tokenizer)
    for word, sign in ((" wonderful", 1), (" terrible", -1), (" table", 0)):
        [token] = tokenizer.encode(word, add_special_tokens=False)
        assert float(found[token]) == pytest.approx(style.lexicon().get(word.strip(), 0.0))
        assert sign * float(found[token]) >= abs(sign)
    assert 1000 < int((found != 0).sum()) < 7500


def test_valences_are_found_in_sentencepiece_vocabularies():
    """A piece that begins a word is written with a mark, and decoded alone without its space."""
    pieces = ["<unk>", "▁wonderful", "▁terrible", "wonderful", "▁table", "▁"]
    whole = Tokenizer(tokenizers.models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<unk>"))
    whole.pre_tokenizer, whole.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>")
    assert tokenizer.decode([1]) == "wonderful"
    lexicon = style.lexicon()
    expected = [0, lexicon["wonderful"], lexicon["terrible"], 0, 0, 0]
    assert reward.valences(tokenizer).tolist() == pytest.approx(expected)


def test_the_second_ruler_agrees_with_people_and_with_what_the_table_says_of_it():
    model = load_model()
    good, bad = (torch.tensor(ruler_study.read_tone(model, side)) for side in contrast.pairs("tone", "report"))
    better = good > bad
    assert float(better.float().mean()) >= 0.9
    rho = studies.read_table("steering_ruler")["rank_correlation"]
    assert rho == studies.read_table("steering_tone")["second_ruler"]
    texts, rating = style.human_ratings("products")
    chosen = np.random.default_rng(99).choice(len(texts), 100, replace=False)
    again = spearman(ruler_study.read_tone(model, [texts[i] for i in chosen]), rating[chosen], n_resamples=200).rho
    assert again.low - 0.1 < rho["products"] < again.high + 0.1  # some of the hundred were fitted on


def test_the_second_ruler_reads_stored_answers_as_the_table_says():
    model, row = load_model(), studies.read_table("steering_tone")["rows"][0]
    found = ruler_study.read_tone(model, row["answers"][:40])
    assert np.allclose(found, row["second"][:40], atol=0.02)


def test_the_shipped_vector_is_the_one_the_table_selected():
    table = studies.read_table("steering_layers")
    assert table["training"] == study.TRAINING
    assert len(contrast.prompts("train")) == 75
    shipped, alpha = study.selected()
    assert (
        shipped.parts[0].method == table["selected"]["recipe"] == "own answers" and alpha == table["selected"]["alpha"]
    )


def test_telling_words_are_counted_and_can_be_left_out():
    answers = {"steer -1": ["A disaster.", "A disaster!"], "steer 0": ["A day.", "A good day."]}
    answers["steer 1"] = ["A wonderful day.", "Good, and a wonderful house."]
    report = figures.Report({"rows": [{"condition": k, "answers": v} for k, v in answers.items()]})
    found = figures.telling_words(report)
    assert found == {"minus": {"disaster": (2, 0)}, "plus": {"wonderful": (2, 0), "good": (1, 1)}}
    left = figures.effect_without(report, ["disaster", "wonderful"])  # "Good" alone is left
    assert left.value == pytest.approx(style.tone(["Good."])[0] / 2, abs=0.01) and left.n == 2
