"""Reporting the dial: ``glassbox study steering-tone steering-seeds steering-costs``, on prompts that chose nothing."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glassbox_utils.core import assets, files, prepared
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.losses import answer_losses, text_losses
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.skills import choice_right, held_texts
from glassbox_utils.core.studies import SEED, read_table, resumed, write_table
from glassbox_utils.core.text import chat, generate, tokenize
from glassbox_utils.steering import contrast, ruler_study, study, style
from glassbox_utils.steering.apply import continuations, steer
from glassbox_utils.steering.vectors import SteeringError, Vector, fingerprint, parts_of, random_vector


def few_shot(side: str, question: str) -> list[dict[str, str]]:
    """Three answered turns with sentences of the train split, then the question."""
    positive, negative = study.train_pairs("tone")
    shown = (positive if side == "positive" else negative)[:3]
    turns = []
    for asked, answer in zip(study.GENERIC, shown, strict=False):
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": str(answer)}]
    return [*turns, {"role": "user", "content": question}]


def prompted(model: Model, kind: str, side: str, question: str) -> str:
    """The chat text of a baseline: ``system`` or ``few-shot``, ``positive`` or ``negative``."""
    if kind == "system":
        return chat(model, question, system=study.SYSTEM[side])
    return chat(model, few_shot(side, question), study.NO_SYSTEM)


PROJECTIONS = (("q_proj", "v_proj"), ("c_attn",), ("query_key_value",), ("qkv_proj",), ("Wqkv",))
"""names of the layers that make queries and values, apart or as one matrix with the keys"""


def projections(model: Model) -> list[str]:
    """The names under which this model makes queries and values. SteeringError if none is known."""
    names = {name.rpartition(".")[2] for name, _ in model.hf.named_modules()}
    found = next((list(p) for p in PROJECTIONS if names.issuperset(p)), None)
    if found is None:
        known = "; ".join(" and ".join(p) for p in PROJECTIONS)
        raise SteeringError(f"No layers of {model.name} are known to make queries and values: {known}.")
    return found


def lora(side: str) -> Path:
    """Train a LoRA on the same sentences that the vector was fitted on; a folder in the cache.

    Rank 4 on the queries and values, AdamW at 1e-3, 4 epochs in batches of 8, loss on the answer only: fixed before
    it was measured.
    """
    from peft import LoraConfig, get_peft_model

    texts = [str(t) for t in study.train_pairs("tone")[0 if side == "positive" else 1]]
    about = f"{side}-{prepared.card().model_hash}-{len(texts)}"
    folder = assets.cache_dir() / "studies" / "steering_lora" / about
    if (folder / "adapter_config.json").exists():
        return folder
    model = load_subject()
    torch.manual_seed(SEED)
    net = get_peft_model(model.hf, LoraConfig(r=4, lora_alpha=8, target_modules=projections(model)))
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    rng = np.random.default_rng(SEED)
    steps = [part for _ in range(4) for part in np.array_split(rng.permutation(len(texts)), len(texts) // 8)]
    for step, rows in enumerate(progress(steps, f"LoRA {side}")):
        before = [chat(model, study.GENERIC[(step + k) % len(study.GENERIC)]) for k in range(len(rows))]
        end = model.tokenizer.eos_token or ""
        batch = tokenize(model, [b + texts[i] + end for b, i in zip(before, rows, strict=True)])
        n_before = torch.tensor([int(tokenize(model, b).attention_mask.sum()) for b in before])
        answer = (batch.attention_mask.cumsum(-1) > n_before[:, None]) & batch.attention_mask.bool()
        last = int(answer.sum(-1).max())  # rows are padded on the left, so the answers are the last tokens
        logits = net(**batch.inputs, logits_to_keep=last + 1).logits[:, :-1].float()
        targets = batch.input_ids.masked_fill(~answer, -100)[:, -last:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with files.atomic_path(folder) as partial:
        net.save_pretrained(str(partial))
    return folder


def half_lora(side: str) -> Path:
    """The same LoRA at half its strength: a second point for comparisons at equal effect."""
    whole = lora(side)
    return scaled_lora(whole, 0.5, whole.with_name(f"{side}-half"))


def scaled_lora(whole: Path, strength: float, folder: Path) -> Path:
    """A copy of an adapter at so many times its strength (its ``lora_alpha``), unless it is there already."""
    if not (folder / "adapter_config.json").exists():
        with files.atomic_path(folder) as partial:
            shutil.copytree(whole, partial)
            config = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
            scaled = json.dumps(config | {"lora_alpha": config["lora_alpha"] * strength})
            (partial / "adapter_config.json").write_text(scaled, encoding="utf-8")
    return folder


@contextmanager
def condition(name: str, plain: Model) -> Iterator[Model]:
    """The model of a condition that changes the model: ``lora +``, ``half-lora -``, ``steer X``, else plain."""
    if name.split()[0] in ("lora", "half-lora"):
        side = "positive" if name.endswith("+") else "negative"
        yield load_subject(adapter=half_lora(side) if name.startswith("half") else lora(side))
    elif name.startswith(("steer", "single")) and (setting := setting_of(name)):
        with steer(plain, *setting):
            yield plain
    else:
        yield plain


def setting_of(name: str) -> tuple[Vector, float] | None:
    """Vector and strength of a condition: ``steer S``, ``single S``, or a random one of RANDOM_KINDS, ``KIND K S``.

    None: it steers nothing.
    """
    kind, *_, step = name.split()
    if not float(step):
        return None
    vector, alpha = study.single() if kind.startswith("single") else study.selected()
    if kind in RANDOM_KINDS:
        vector = random_vector(vector, int(name.split()[1]), kind == "shared")
    return vector, float(step) * alpha


def answers_of(name: str, model: Model, questions: Sequence[str]) -> list[str]:
    """Greedy answers of one condition: one of ``setting_of``, or one of BASELINES and a sign, ``lora +``."""
    side = "positive" if name.endswith("+") else "negative"
    kind = name.split()[0]
    if kind in ("steer", "single", *RANDOM_KINDS):
        settings = [setting_of(name)] * len(questions)
        return continuations(model, questions, settings, study.NEW_TOKENS, BATCH, system=study.NO_SYSTEM)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    texts = [""] * len(questions)
    with condition(name, model) as used_model:
        for start in progress(range(0, len(order), 50), name):
            rows = order[start : start + 50]
            if "lora" in kind:
                asked = [chat(used_model, questions[i], study.NO_SYSTEM) for i in rows]
            else:
                asked = [prompted(used_model, kind, side, questions[i]) for i in rows]
            for i, text in zip(rows, generate(used_model, asked, study.NEW_TOKENS), strict=True):
                texts[i] = text
    return texts


BASELINES = ("system", "few-shot", "lora")
"""a model may not know one (its template no system prompt, its context no examples): left out, with the reason.

``half-lora`` can be put beside them: the same adapter at half its strength"""
MAIN = (
    [f"steer {s:.4g}" for s in study.STEPS] + [f"{k} {s}" for k in BASELINES for s in "-+"] + ["single -1", "single 1"]
)
RANDOM_KINDS = (*study.KINDS, "single-random")
BATCH = 100
"""answers that are written at once"""


def report_prompts() -> list[str]:
    """The 200 report prompts; fewer where the folder's size is small."""
    return contrast.prompts("report")[: prepared.sized(200, 16)]


def half_of(prompts: Sequence[str], part: int) -> Sequence[str]:
    """The first half of the prompts, or the second."""
    middle = len(prompts) // 2
    return prompts[middle:] if part else prompts[:middle]


def left_out(name: str, model: Model) -> str:
    """Why this model can't be measured under a baseline: one paragraph; empty if it can."""
    if name.split()[0] not in BASELINES:
        return ""
    try:
        if "lora" in name:
            projections(model)
        else:
            longest = max(report_prompts(), key=len)
            for side in ("positive", "negative"):
                generate(model, prompted(model, name.split()[0], side, longest), study.NEW_TOKENS)
    except GlassboxError as reason:
        return str(reason)
    return ""


def random_conditions() -> dict[str, int]:
    """Every random condition, and how many halves of the report prompts it answers: all where the bar is counted."""
    plan = {("shared", 1.0): 1, ("shared", study.turn()): 2, ("apart", study.turn()): 2, ("single-random", 1.0): 2}
    return {
        f"{kind} {k} {s * step:g}": halves
        for (kind, step), halves in plan.items()
        for k in range(study.N_RANDOM)
        for s in (-1, 1)
    }


def layers_of(vector: Vector) -> list[int]:
    """The layers after which a vector is added."""
    return [part.layer for part in parts_of(vector)]


def used_by(name: str) -> list[Any]:
    """What a condition depends on, for the cache: its vector and strength; empty if none."""
    steers = name.split()[0] in ("steer", "single", *RANDOM_KINDS) and setting_of(name)
    return [fingerprint(steers[0]), steers[1]] if steers else []


def _losses(model: Model, questions: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
    return [x.tolist() for x in answer_losses(model, questions, answers, 50, study.NO_SYSTEM)]


def tone_row(model: Model, name: str) -> dict[str, Any]:
    """One condition on the report prompts: tone, losses, relevance (of the first 50) and the answers."""
    questions = report_prompts()
    texts = answers_of(name, model, questions)
    row: dict[str, Any] = {"condition": name, "tone": style.tone(texts).round(4).tolist(), "answers": texts}
    row["second"] = ruler_study.read_tone(model, texts)
    losses, counts = answer_losses(model, questions, texts, 50, study.NO_SYSTEM)
    few = slice(0, prepared.sized(50, 16))  # relevance is as costly as generation
    others = [*questions[1:], questions[0]]
    unrelated, _ = answer_losses(model, others[few], texts[few], 50, study.NO_SYSTEM)
    relevance = (unrelated - losses[few]) / np.maximum(counts[few], 1)
    row |= {"loss": losses.round(3).tolist(), "tokens": counts.tolist()}
    return row | {"relevance": relevance.round(4).tolist()}


def random_tones(model: Model, conditions: Sequence[tuple[str, int]]) -> list[dict[str, list[float]]]:
    """Tone under random directions, each on one half of the report prompts; of the shared ones by both rulers."""
    asked = [half_of(report_prompts(), part) for _, part in conditions]
    settings = [setting_of(name) for (name, _), questions in zip(conditions, asked, strict=True) for _ in questions]
    every = [question for questions in asked for question in questions]
    texts = iter(continuations(model, every, settings, study.NEW_TOKENS, BATCH, system=study.NO_SYSTEM))
    rows = []
    for (name, _), questions in zip(conditions, asked, strict=True):
        own = list(islice(texts, len(questions)))
        row = {"tone": style.tone(own).round(4).tolist()}
        rows.append(row | ({"second": ruler_study.read_tone(model, own)} if name.startswith("shared") else {}))
    return rows


def random_rows(model: Model) -> list[dict[str, Any]]:
    """A row of every random condition. Of few prompts, several conditions share a batch."""
    plan = random_conditions()
    units = [(name, part) for name, halves in plan.items() for part in range(halves)]
    together = max(1, BATCH // len(half_of(report_prompts(), 1)))
    found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in plan}
    for first in progress(range(0, len(units), together), "random directions"):
        here = units[first : first + together]
        key = [tone_key(model, *unit) for unit in here]
        for (name, _), row in zip(here, resumed("steering_tone", key, random_tones, model, here), strict=True):
            found[name].append(row)
    return [
        {"condition": name} | {ruler: [v for part in parts for v in part[ruler]] for ruler in parts[0]}
        for name, parts in found.items()
    ]


def tone_key(model: Model, name: str, *part: int) -> list[Any]:
    """What a row of ``study_tone`` depends on."""
    return [name, *part, model.hash, study.NEW_TOKENS, len(report_prompts()), study.NO_SYSTEM, *used_by(name)]


def study_tone() -> Path:
    """Answers to the report prompts under every condition, with tone, perplexity and relevance."""
    start, model = time.time(), load_subject()
    vector, alpha = study.selected()
    without = {name: reason for name in MAIN if (reason := left_out(name, model))}
    names = [name for name in MAIN if name not in without]
    rows = [resumed("steering_tone", tone_key(model, name), tone_row, model, name) for name in names]
    about: dict[str, Any] = {"layers": layers_of(vector), "alpha": alpha, "left_out": without}
    about["second_ruler"] = read_table("steering_ruler")["rank_correlation"]
    about["prompts"] = report_prompts()
    rows += random_rows(model)
    return write_table("steering_tone", model, time.time() - start, **about, rows=rows)


# --- with sampling ------------------------------------------------------------------------------------

SEEDS = (0, 1, 2, 3, 4)
TEMPERATURE = 0.7
SAMPLED = ("steer -1", "steer 0", "steer 1")


def sampled_prompts() -> list[str]:
    """Every fifth of the report prompts: 40, or the first of them where the folder's size is small."""
    return contrast.prompts("report")[::5][: prepared.sized(40, 8)]


def sampled_tones(name: str, model: Model, seed: int) -> list[float]:
    """Tone of one sampled answer to each of ``sampled_prompts`` under one condition."""
    asked = sampled_prompts()
    settings = [setting_of(name)] * len(asked)
    texts = continuations(
        model, asked, settings, study.NEW_TOKENS, BATCH, TEMPERATURE, 100 * seed, system=study.NO_SYSTEM
    )
    return style.tone(texts).round(4).tolist()


def study_seeds() -> Path:
    """Sampled answers: ``sampled_prompts`` x five seeds, at -alpha, 0 and +alpha."""
    start, model = time.time(), load_subject()
    vector, alpha = study.selected()
    rows = []
    for name in progress(SAMPLED, "conditions"):
        base = [model.hash, study.NEW_TOKENS, TEMPERATURE, len(sampled_prompts()), *used_by(name)]
        tones = [resumed("steering_seeds", [name, k, *base], sampled_tones, name, model, k) for k in SEEDS]
        rows.append({"condition": name, "tone": tones})
    about = {"layers": layers_of(vector), "alpha": alpha, "temperature": TEMPERATURE, "seeds": SEEDS}
    return write_table("steering_seeds", model, time.time() - start, **about, rows=rows)


# --- what else it costs -------------------------------------------------------------------------------

COSTS = ["steer 0", "steer -1", "steer 1", "steer -0.5", "steer 0.5", "single -1", "single 1"]
COSTS += [f"{kind} {sign}" for kind in BASELINES for sign in "-+"]
CHOICES = ("steer 0", "steer -1", "steer 1", "single -1", "single 1", "lora -", "lora +")
"""conditions that also answer multiple-choice questions"""


def instructions() -> tuple[list[str], list[str]]:
    """Unrelated requests with a helpful answer to each: the refusal pairs' helpful side, 62 of the train split."""
    answered = contrast.pairs("refusal", "train")[1]
    answered = answered[: prepared.sized(len(answered), 12)]
    return [t[0] for t in answered], [t[1] for t in answered]


def costs_of(name: str, plain: Model) -> dict[str, list[float]]:
    """Per-item losses and hits of one condition.

    A prompt has no place in front of plain text and of a question without a chat: there it costs nothing.
    """
    kind, side = name.split()[0], "positive" if name.endswith("+") else "negative"
    system = study.SYSTEM[side] if kind == "system" else study.NO_SYSTEM
    asked: Sequence[Any]
    asked, replies = instructions()
    if kind == "few-shot":
        asked = [few_shot(side, question) for question in asked]
    with condition(name, plain) as model:
        reply, n_reply = answer_losses(model, asked, replies, 25, system)
        result = {"reply_loss": reply, "reply_tokens": n_reply}
        if kind not in ("system", "few-shot"):
            text, n_text = text_losses(model, held_texts(prepared.sized(40, 8)), max_tokens=96)
            result |= {"text_loss": text, "text_tokens": n_text}
        rounded = {k: np.round(v, 3).tolist() for k, v in result.items()}
        return rounded | ({"choice": choice_right(model, prepared.sized(100, 20))} if name in CHOICES else {})


def study_costs() -> Path:
    """Other skills under steering, LoRA and prompts: held-out text, unrelated instructions, multiple choice."""
    start, model = time.time(), load_subject()
    vector, alpha = study.selected()
    rows, without = [], {name: reason for name in COSTS if (reason := left_out(name, model))}
    for name in progress([name for name in COSTS if name not in without], "conditions"):
        key = [name, model.hash, *used_by(name)]
        rows.append({"condition": name} | resumed("steering_costs", key, costs_of, name, model))
    about = {"layers": layers_of(vector), "alpha": alpha, "left_out": without}
    return write_table("steering_costs", model, time.time() - start, **about, rows=rows)


# --- far from the weather --------------------------------------------------------------------------------

FACTS = {
    "What is the capital of France?": ("paris",),
    "What is 7 + 5?": ("12", "twelve"),
    "Name three planets.": ("mars", "venus", "earth", "jupiter", "saturn"),
    "Write a Python function that adds two numbers.": ("return", "+"),
    "Translate 'good morning' into Spanish.": ("buenos", "buenas"),
    "Who wrote Hamlet?": ("shakespeare",),
    "How many days has a week?": ("7", "seven"),
    "What is water made of?": ("hydrogen", "oxygen", "h2o"),
}
"""questions that have nothing to do with tone, and words one of which a right answer holds"""


def facts_kept(model: Model, vector: Vector, alphas: Sequence[float]) -> list[tuple[list[str], list[bool]]]:
    """At each strength: steered answers to FACTS, and whether each still holds its fact."""
    settings = [(vector, alpha) for alpha in alphas for _ in FACTS]
    texts = continuations(model, list(FACTS) * len(alphas), settings, 30, 100, system=study.NO_SYSTEM)
    words = [*FACTS.values()] * len(alphas)
    right = [any(w in t.lower() for w in ws) for t, ws in zip(texts, words, strict=True)]
    n = len(FACTS)
    return [(texts[i : i + n], right[i : i + n]) for i in range(0, len(texts), n)]


# --- at equal effect ----------------------------------------------------------------------------------

SIDE_EFFECTS = ("answers", "relevance", "text", "reply")
"""more nats per token: the answers under the plain model, relevance lost, held-out text, unrelated replies"""


def extra(rows: Mapping[str, Mapping[str, Any]], signs: tuple[str, str], kind: str) -> NDArray:
    """What a method's two signs cost more than the plain model, nats per token: mean of both signs, one per item.

    ``rows``: condition -> row of the study that measured ``kind`` (one of SIDE_EFFECTS).
    """

    def each(name: str) -> NDArray:
        row = rows[name]
        if kind == "relevance":
            return -np.array(row["relevance"])
        loss, tokens = ("loss", "tokens") if kind == "answers" else (f"{kind}_loss", f"{kind}_tokens")
        return np.array(row[loss]) / np.maximum(row[tokens], 1)

    return (each(signs[0]) + each(signs[1])) / 2 - each("steer 0")


def at_effect(points: Sequence[tuple[float, NDArray]], target: float) -> NDArray:
    """Per-item values at the strength whose effect is ``target``: linear between measured (effect, values) points.

    The points start at (0, zeros). Raises SteeringError for an effect that no measured strength reaches.
    """
    effects = [effect for effect, _ in points]
    above = [i for i, effect in enumerate(effects) if effect >= target]
    if not above or target < 0 or sorted(effects) != effects:
        raise SteeringError(
            f"No setting between those measured has the effect {target:.2f}; theirs are "
            f"{', '.join(f'{e:.2f}' for e in effects)}. Measure a stronger one, or compare at a smaller effect."
        )
    i = above[0]
    if i == 0:
        return points[0][1]
    (low, before), (high, after) = points[i - 1], points[i]
    weight = (target - low) / (high - low)
    return (1 - weight) * before + weight * after


TABLES = ("sweep", "sharper", "layers", "alone", "tone", "seeds", "costs", "order", "controls", "plain")
"""what notebook 05 draws: data/studies/steering_NAME.json"""

STUDIES_OF_STEERING = {
    "steering-sweep": study.study_sweep,
    "steering-sharper": study.study_sharper,
    "steering-layers": study.study_layers,
    "steering-ruler": ruler_study.study_ruler,
    "steering-tone": study_tone,
    "steering-seeds": study_seeds,
    "steering-costs": study_costs,
}
