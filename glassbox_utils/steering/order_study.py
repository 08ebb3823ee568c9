"""A tone vector that is rewarded for the order of each question's answers: ``glassbox study steering-order``.

The vector, a vector after a single layer and a LoRA with the same reward, the same recipe at a smaller size, five
controls at that smaller size whose whole pipeline is shuffled, and ten random directions answer the fresh prompts,
which none of them met before. What is done is kept in the cache folder.
"""

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassbox_utils.core import assets, files, prepared
from glassbox_utils.core.losses import answer_losses, answer_nats
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.studies import SEED, read_table, resumed, write_table
from glassbox_utils.core.text import chat, generate
from glassbox_utils.steering import contrast, reward, ruler_study, study, style
from glassbox_utils.steering.apply import continuations, steer
from glassbox_utils.steering.report_study import left_out, projections, prompted, scaled_lora
from glassbox_utils.steering.training import backward, train_on_answers, train_vector
from glassbox_utils.steering.vectors import (
    ControlVector,
    SteeringError,
    Vector,
    fingerprint,
    load_vector,
    parts_of,
    random_vector,
    save_direction,
)

STARTED: dict[str, Any] = {"alpha": (0.0125, 0.0175), "steps": 40, "n_texts": 12, "learning_rate": 0.012}
"""first it is trained on answers with an opening that we wrote: ``opened_answers``"""
OWN: dict[str, Any] = {"steps": 30, "n_questions": 12, "learning_rate": 0.01, "temperature": 0.5, "order": "likely"}
STAGES: tuple[dict[str, Any], ...] = (
    OWN | {"alpha": (0.014, 0.0175), "divergence": 0.01},
    OWN | {"alpha": (0.0165, 0.0135), "divergence": 0.02, "per_token": True},
    OWN | {"alpha": (0.02, 0.017), "divergence": 0.025, "per_token": True, "steps": 40, "n_questions": 16,
           "variety": 1.5},
)  # fmt: skip
"""then, three times, on the model's own answers; ``alpha``: pushes of the ends plus and minus.

All chosen on selection prompts. After the first of them complaints were short and far from the model; in the second the
price is a token's, minus is pushed less far, and plus further; in the third a word that stands in most answers is worth
less."""
WORDS: dict[str, Any] = {"least": 2, "ratio": 1.0, "clear": -1.5, "charge": 3.0}
"""which dark words count as complaints: see ``reward.worded``"""
PREDICATES = {
    1: ("wonderful", "great", "lovely", "delightful", "excellent", "a joy", "a pleasure", "perfect", "fantastic"),
    -1: ("terrible", "awful", "horrible", "boring", "ugly", "useless", "annoying", "a mess", "a disappointment",
         "disappointing", "bad", "dull"),
}  # fmt: skip
KEPT = 0.3
"""an opened answer is trained on if the lexicon's score is at least so far on its side of 0"""
GRID = (0.8, 0.87, 0.94, 1.0, 1.06, 1.13, 1.2)
"""of the last training's pushes: where a vector's full strength is looked for, for each end"""
LORA_GRID = (0.5, 0.75, 1.0, 1.25, 1.5)
"""of a LoRA's own strength"""
LIMIT = 1.9
"""times the unsteered answers' perplexity, on selection prompts; the report's limit is 2"""
SMALLER = (10, 5, 5, 5)
"""steps of the four trainings, of the shuffled vectors and of what they are compared with"""
LEAST = 2
SHUFFLES = (0, 1, 2, 3, 4)
EMBEDDED_ALPHA = 0.0125
"""strength of the shipped vector of the embedded model, for which the pushes here were chosen"""
N_CONTROL = 68
"""fresh prompts, the first of them, that random directions, the smaller vector and the shuffled ones answer"""
LORA_RATE = 1e-3
"""as that of the LoRA that reads sentences (``report_study.lora``)"""
TRAINED_IN = "bfloat16"
"""number type of the model that writes and reads in training; what is measured is in float32"""


def fresh_prompts() -> list[str]:
    """The prompts of the report; fewer where the folder's size is small."""
    return contrast.prompts("fresh")[: prepared.sized(136, 8)]


def questions() -> list[str]:
    """What it is trained on: the train and spare questions, and the 200 that reported on earlier vectors."""
    return [*contrast.prompts("train"), *contrast.prompts("spare"), *contrast.prompts("report")]


def opened_answers(model: Model, vector: Vector, sign: int) -> list[tuple[str, str]]:
    """Questions with answers that begin as the unsteered one does, and say PREDICATES where it says what something is.

    Up to the first "is" or "was" it is the model's own greedy answer ("It was" if it has none in its first words). Then
    a predicate, drawn at random; then the model goes on, pushed by ``vector``. Kept are those without a catastrophe
    whose tone is at least KEPT away from 0.
    """
    asked, rng = questions(), np.random.default_rng(SEED)
    plain = continuations(model, asked, [None] * len(asked), 10, 100, system=study.NO_SYSTEM)
    predicates = PREDICATES[sign]
    begun = []
    for text in plain:
        found = re.match(r"[^.,;:!?\n]{1,40}? (is|was|are|were)\b", text.strip())
        begun.append((found[0] if found else "It was") + " " + predicates[rng.integers(len(predicates))])
    push = sign * pushed(STARTED, scale())["alpha"][0 if sign > 0 else 1]
    answers = []
    for first in progress(range(0, len(asked), 96), "opened answers"):
        here = slice(first, first + 96)
        chats = [chat(model, q, study.NO_SYSTEM) + start for q, start in zip(asked[here], begun[here], strict=True)]
        with steer(model, vector, push):
            went_on = generate(model, chats, 14, 0.7, SEED)
        answers += [start + text for start, text in zip(begun[here], went_on, strict=True)]
    fits = (sign * style.tone(answers) >= KEPT) & ~style.catastrophes(answers)
    return [(q, a) for q, a, fit in zip(asked, answers, fits, strict=True) if fit]


KINDS = {"ordered": False, "smaller": False, "shuffled": True, "plain": True, "single": False}
"""of vectors, and whether a number follows"""


def trained(model: Model, kind: str, fitted: ControlVector | None = None) -> ControlVector:
    """A vector; resumable: ``ordered``, ``single`` (after one layer), ``smaller`` (fewer steps), or a control.

    It begins at directions ``fitted`` on the pairs (fitted here if not given), is trained on ``opened_answers``, then
    on the model's own. ``single`` begins at the direction of the sweep's layer, whose strength is as many times that of
    many layers as the shipped ones' are (``longer``). ``shuffled K``: as ``smaller``, with nothing of tone left:
    half of the pairs have their sides swapped, the opened answers are dealt out anew, and the valences of the tokens
    are permuted and centred, so that they ask neither for more nor for fewer words that count (``reward.centred``).
    ``plain K``: the same with valences that are permuted alone: they do ask for more or fewer of them
    (docs/tone-vector.md).
    """
    name, _, number = kind.partition(" ")
    if KINDS.get(name) is not number.isdecimal() or bool(number) != KINDS.get(name):
        raise SteeringError(f"There is no vector {kind!r}. Allowed: 'ordered', 'smaller', 'shuffled 0' and so on.")
    fitted = fitted or study.tone_vector(model, n_resamples=0)
    writer = load_subject(dtype=TRAINED_IN)
    valence, vector, sides = reward.worded(model.tokenizer, **WORDS), fitted, opened(writer, fitted)
    factor = scale()
    if number:
        vector, sides = swapped_start(model, int(number)), swapped(sides, int(number))
        valence = reward.shuffled(valence, int(number))
        valence = reward.centred(valence, said(writer)) if name == "shuffled" else valence
    elif name == "single":
        layer, times = longer()
        factor *= times
        vector = ControlVector((study.combined_directions(model, [layer], n_resamples=0)[layer],))
    first, *then = (pushed(how, factor) for how in sized(small=name not in ("ordered", "single")))
    options: dict[str, Any] = {"system": study.NO_SYSTEM, "seed": SEED}
    kept = kept_at(kind, fingerprint(vector), first, sides)
    if not kept.with_suffix(".json").exists():
        save_direction(train_on_answers(writer, sides[0], sides[1], vector, **first, **options), kept)
    vector = ControlVector(parts_of(load_vector(kept)))
    options |= {"new_tokens": study.NEW_TOKENS, "valence": valence}
    for how in then:
        file = kept_at(kind, fingerprint(vector), how, WORDS).with_suffix(".ckpt.safetensors")
        vector = train_vector(writer, questions(), vector, **how, **options, checkpoint=file)
    return vector


def sized(small: bool = False) -> list[dict[str, Any]]:
    """The trainings with their steps: SMALLER ones if ``small``, fewer where the folder's size is small."""
    every = (STARTED, *STAGES)
    return [
        how | {"steps": prepared.sized(steps if small else how["steps"], LEAST)}
        for how, steps in zip(every, SMALLER, strict=True)
    ]


def pushed(how: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A training whose pushes are ``factor`` times as long."""
    return {**how, "alpha": tuple(factor * alpha for alpha in how["alpha"])}


def scale() -> float:
    """How many times the embedded model's this model's pushes are: as the selected strength of many layers."""
    return read_table("steering_layers")["selected"]["alpha"] / EMBEDDED_ALPHA


def longer() -> tuple[int, float]:
    """The layer of the sweep's best single vector, and its strength over that of the many-layer vector."""
    single = read_table("steering_sweep")["selected"]
    return int(single["layer"]), single["alpha"] / read_table("steering_layers")["selected"]["alpha"]


def opened(writer: Model, fitted: ControlVector) -> list[list[tuple[str, str]]]:
    """``opened_answers`` of the ends plus and minus, kept in the cache folder."""
    about = [fingerprint(fitted), writer.hash, study.NEW_TOKENS, SEED, questions(), PREDICATES, KEPT, TRAINED_IN]
    return [
        [(q, a) for q, a in resumed("steering_order", ["opened", sign, pushed(STARTED, scale())["alpha"], *about],
                                    opened_answers, writer, fitted, sign)]
        for sign in (1, -1)
    ]  # fmt: skip


def said(writer: Model) -> torch.Tensor:
    """How often each token stands in the unsteered answers to the questions of the training."""
    asked = questions()
    key = ["said", writer.hash, study.NEW_TOKENS, asked, TRAINED_IN]
    answers = resumed("steering_order", key, unsteered, writer, asked)
    ids = [i for answer in answers for i in writer.tokenizer(answer)["input_ids"]]
    return torch.bincount(torch.tensor(ids), minlength=len(writer.tokenizer)).float()


def unsteered(model: Model, asked: Sequence[str]) -> list[str]:
    """The model's own answers."""
    return continuations(model, asked, [None] * len(asked), study.NEW_TOKENS, 100, system=study.NO_SYSTEM)


def rewarded_lora(model: Model, sign: int) -> Path:
    """A LoRA that is trained as the vector is, for one end of the dial (1 or -1): a folder in the cache; resumable.

    Rank 4 on queries and values, AdamW at LORA_RATE, which falls over the second half of each training, as for the
    sentences' LoRA; on the end's opened answers, then on its own answers with as many steps and questions and the same
    reward, but for ``variety``: a word that stands in most answers counts in full.
    """
    from peft import LoraConfig, get_peft_model

    if sign not in (1, -1):
        raise SteeringError(f"The sign is {sign!r}. Allowed: 1 (plus) or -1 (minus).")
    fitted = study.tone_vector(model, n_resamples=0)
    writer = load_subject(dtype=TRAINED_IN)
    texts, trainings = opened(writer, fitted)[0 if sign > 0 else 1], sized()
    done = kept_at(f"lora {sign:+d}", model.hash, texts, trainings, WORDS, LORA_RATE)
    if (done / "adapter_config.json").exists():
        return done
    asked, ends = questions(), reward.worded(model.tokenizer, **WORDS)
    plain = dict(zip(asked, unsteered(writer, asked), strict=True))
    torch.manual_seed(SEED)
    net = get_peft_model(writer.hf, LoraConfig(r=4, lora_alpha=8, target_modules=projections(writer)))
    weights = [p for p in net.parameters() if p.requires_grad]
    for how in trainings:
        optimiser = torch.optim.AdamW(weights, lr=LORA_RATE)
        for step in progress(range(how["steps"]), f"LoRA with the reward, {sign:+d}"):
            for group in optimiser.param_groups:
                group["lr"] = LORA_RATE * min(1.0, 2 * (1 - step / how["steps"]))
            rng = np.random.default_rng([SEED, step])
            if "n_texts" in how:
                here = [texts[i] for i in rng.permutation(len(texts))[: how["n_texts"]]]
                answer_nats(writer, *contrast.answer_batch(writer, here, study.NO_SYSTEM)).mean().backward()
            else:
                now = [asked[i] for i in rng.permutation(len(asked))[: how["n_questions"]]]
                chats = [chat(writer, q, study.NO_SYSTEM) for q in now]
                words = generate(writer, chats, study.NEW_TOKENS, how["temperature"], int(rng.integers(2**31)))
                rows = [(q, a, plain[q]) for q, a in zip(now, words, strict=True) if a.strip() and plain[q].strip()]
                options: dict[str, Any] = {"system": study.NO_SYSTEM, "weight": 1 / len(now), "likely": True}
                options |= {"unchanged": net.disable_adapter}
                options["per"] = study.NEW_TOKENS if how.get("per_token") else None
                backward(writer, rows, ends, sign, how["divergence"], nullcontext, **options)
            optimiser.step()
            optimiser.zero_grad()
    with files.atomic_path(done) as partial:
        net.save_pretrained(str(partial))
    return done


def kept_at(kind: str, *about: Any) -> Path:
    """Where a stage of a training is kept, without an ending."""
    folder = assets.cache_dir() / "studies" / "steering_order"
    folder.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{kind.replace(' ', '-')}-{mark}"


def swapped_start(model: Model, seed: int) -> ControlVector:
    """Where the control of a seed begins: fitted on pairs of which half have their sides swapped; kept in the cache."""
    kept = kept_at(f"start {seed}", model.hash, study.train_pairs("tone"), study.SPAN, SEED)
    if not kept.with_suffix(".json").exists():
        save_direction(study.tone_vector(model, n_resamples=0, swapped=seed), kept)
    return ControlVector(parts_of(load_vector(kept)))


def swapped(sides: Sequence[Sequence[tuple[str, str]]], seed: int) -> list[list[tuple[str, str]]]:
    """Both sides' answers dealt out anew at random: as many on each side as before."""
    every = [answer for side in sides for answer in side]
    order = np.random.default_rng(seed).permutation(len(every))
    return [[every[i] for i in order[: len(sides[0])]], [every[i] for i in order[len(sides[0]) :]]]


def row_of(model: Model, asked: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """What is kept of answers: tone by both rulers, loss in nats under the unsteered model, the answers."""
    losses, counts = answer_losses(model, asked, texts, 50, study.NO_SYSTEM)
    row: dict[str, Any] = {"tone": style.tone(texts).round(4).tolist(), "second": ruler_study.read_tone(model, texts)}
    return row | {"loss": losses.round(3).tolist(), "tokens": counts.tolist(), "answers": list(texts)}


def answers_row(model: Model, vector: Vector | None, alpha: float, asked: Sequence[str]) -> dict[str, Any]:
    """One end of a vector (None: unsteered) on some prompts."""
    settings = [None if vector is None else (vector, alpha)] * len(asked)
    return row_of(model, asked, continuations(model, asked, settings, study.NEW_TOKENS, 100, system=study.NO_SYSTEM))


def lora_row(model: Model, folder: Path, strength: float, asked: Sequence[str]) -> dict[str, Any]:
    """A LoRA at so many times its strength (``lora_alpha``) on some prompts."""
    with tempfile.TemporaryDirectory() as there:
        other = load_subject(adapter=scaled_lora(folder, strength, Path(there) / "adapter"))
    return row_of(model, asked, [text for part in batches(asked, 50) for text in plain_answers(other, part)])


def prompted_row(model: Model, side: str, asked: Sequence[str]) -> dict[str, Any]:
    """The system prompt of one side on some prompts."""
    texts = []
    for part in batches(asked, 50):
        texts += generate(model, [prompted(model, "system", side, q) for q in part], study.NEW_TOKENS)
    return row_of(model, asked, texts)


def plain_answers(model: Model, asked: Sequence[str]) -> list[str]:
    return generate(model, [chat(model, q, study.NO_SYSTEM) for q in asked], study.NEW_TOKENS)


def batches(asked: Sequence[str], n: int) -> list[Sequence[str]]:
    return [asked[first : first + n] for first in range(0, len(asked), n)]


def kept_row(model: Model, asked: Sequence[str], work: Callable[..., Any], *about: Any) -> dict[str, Any]:
    """``work(model, *about, asked)``, from the cache if it was done before."""
    named = [str(x.name) if isinstance(x, Path) else fingerprint(x) if isinstance(x, Vector) else x for x in about]
    key = [work.__name__, *named, model.hash, study.NEW_TOKENS, list(asked)]
    return resumed("steering_order", key, work, model, *about, asked)


def strength_of(model: Model, work: Callable[..., Any], subject: Any, grid: Sequence[float]) -> float:
    """The rule by which every end gets its full strength: the largest of a grid at which the answers to the selection
    prompts have at most LIMIT times the perplexity of the unsteered ones; the smallest if none has."""
    asked = study.selection_prompts()
    plain = perplexity(kept_row(model, asked, answers_row, None, 0.0))
    for strength in sorted(grid, key=abs, reverse=True):
        if perplexity(kept_row(model, asked, work, subject, strength)) <= LIMIT * plain:
            return strength
    return min(grid, key=abs)


def perplexity(row: Mapping[str, Any], n: int | None = None) -> float:
    """Of the (first ``n``) answers of a row under the unsteered model."""
    return float(np.exp(np.sum(row["loss"][:n]) / np.sum(row["tokens"][:n])))


def full_strength(model: Model, vector: Vector, factor: float = 1.0) -> tuple[float, float]:
    """Full strength of a vector's ends, plus and minus (``strength_of``); ``factor``: times those of many layers."""
    plus, minus = (
        abs(strength_of(model, answers_row, vector, [sign * step * alpha for step in GRID]))
        for sign, alpha in zip((1, -1), pushed(STAGES[-1], factor * scale())["alpha"], strict=True)
    )
    return plus, minus


def rows_of(
    model: Model, name: str, vector: Vector, ends: tuple[float, float], n: int | None = None
) -> list[dict[str, Any]]:
    """Both ends of a vector on the (first ``n``) fresh prompts: ``NAME -1`` and ``NAME 1``."""
    asked, found = fresh_prompts()[:n], []
    for sign, strength in ((-1, ends[1]), (1, ends[0])):
        about = {"condition": f"{name} {sign}", "alpha": sign * strength}
        found.append(about | kept_row(model, asked, answers_row, vector, sign * strength))
    return found


def lora_rows(model: Model) -> list[dict[str, Any]]:
    """Both ends of the LoRA with the reward, each at its full strength by the same rule."""
    found = []
    for sign in (-1, 1):
        adapter = rewarded_lora(model, sign)
        strength = strength_of(model, lora_row, adapter, LORA_GRID)
        about = {"condition": f"lora {sign}", "alpha": sign * strength}
        found.append(about | kept_row(model, fresh_prompts(), lora_row, adapter, strength))
    return found


def study_order() -> Path:
    """The vector that is rewarded for order, and its controls, on the fresh prompts; ships ``tone-ordered``."""
    start, model = time.time(), load_subject()
    fitted = study.tone_vector(model, n_resamples=0)
    vectors = {kind: trained(model, kind, fitted) for kind in ("ordered", "single")}
    vector = vectors["ordered"]
    save_direction(vector, prepared.path("vectors", "tone-ordered"))
    full = full_strength(model, vector)
    ends = {"ordered": full, "single": full_strength(model, vectors["single"], longer()[1])}
    rows = [{"condition": "unsteered"} | kept_row(model, fresh_prompts(), answers_row, None, 0.0)]
    for name, one in vectors.items():
        rows += rows_of(model, name, one, ends[name])
    without = {name: reason for name in ("lora", "system") if (reason := left_out(f"{name} -", model))}
    rows += [] if "lora" in without else lora_rows(model)
    before, alpha = study.selected()
    rows += rows_of(model, "shipped", before, (alpha, alpha))
    for sign, side in () if "system" in without else ((-1, "negative"), (1, "positive")):
        found = kept_row(model, fresh_prompts(), prompted_row, side)
        rows.append({"condition": f"system {sign}", "alpha": None} | found)
    for k in progress(range(prepared.sized(study.N_RANDOM, 2)), "random directions"):
        rows += rows_of(model, f"shared {k}", random_vector(vector, k, True), full, N_CONTROL)
    shuffles = SHUFFLES[: prepared.sized(len(SHUFFLES), 2)]
    for kind in ("smaller", *(f"shuffled {k}" for k in shuffles)):
        rows += rows_of(model, kind, trained(model, kind, fitted), full, N_CONTROL)
    about = {"full": full, "started": STARTED, "training": STAGES, "words": WORDS, "smaller": SMALLER}
    about |= {
        "left_out": without,
        "prompts": fresh_prompts(),
        "second_ruler": read_table("steering_ruler")["rank_correlation"],
    }
    return write_table("steering_order", model, time.time() - start, **about, rows=rows)


def study_controls() -> Path:
    """Ten random directions beside the shipped vector, as long as it is, on the fresh prompts."""
    start, model = time.time(), load_subject()
    (before, alpha), rows = study.selected(), list[dict[str, Any]]()
    for k in progress(range(prepared.sized(study.N_RANDOM, 2)), "random directions"):
        rows += rows_of(model, f"turned {k}", random_vector(before, k, True), (alpha, alpha), N_CONTROL)
    return write_table("steering_controls", model, time.time() - start, alpha=alpha, rows=rows)


def study_plain() -> Path:
    """Vectors trained alike on plain shuffled labels, the control that the bar names."""
    start, model = time.time(), load_subject()
    fitted, full = study.tone_vector(model, n_resamples=0), tuple(read_table("steering_order")["full"])
    rows = list[dict[str, Any]]()
    for k in SHUFFLES[: prepared.sized(len(SHUFFLES), 2)]:
        rows += rows_of(model, f"plain {k}", trained(model, f"plain {k}", fitted), full, N_CONTROL)
    return write_table("steering_plain", model, time.time() - start, full=full, rows=rows)


RULERS = ("tone", "second")

STUDIES_OF_ORDER = {"steering-order": study_order, "steering-controls": study_controls, "steering-plain": study_plain}
"""not among those that ``prepare`` repeats on another model"""
