"""The long runs behind notebook 05: ``glassbox study steering-NAME``, names in STUDIES_OF_STEERING.

Each is resumable (what is done is kept in the cache folder and not done again), deterministic, and writes one table
under ``data/studies/`` with its provenance. Sweep, sharper and layers select, on selection prompts; tone, seeds and
costs report.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from glassbox_utils import assets, steering, style
from glassbox_utils.evaluation import Interval, spearman, text_losses
from glassbox_utils.models import Model, chat, generate, load_model, progress, tokenize
from glassbox_utils.skills import choice_right, held_texts
from glassbox_utils.steering_training import train_vector
from glassbox_utils.studies import SEED, read_table, resumed, write_table

LAYERS = (6, 9, 15, 21)
"""of 30; the last fifth of the layers is left out as in refusal_direction"""
CLOSER = (15,)
"""layers of the second round: where the first had the most effect for its side effect"""
CLOSER_ALPHAS = (0.08, 0.14)
RECIPES = ("combined", "trained")
SELECTION_SEEDS = (100, 101)
"""random directions of the second round; the report's have the seeds 0 to 9"""
TURN_SEEDS = tuple(range(100, 110))
"""random directions that the many-layer vector is compared with on selection prompts"""
NO_SYSTEM = ""
"""the report's chats have an empty system message: the model's default one would be most of every prompt"""
ALPHAS = (0.08, 0.14, 0.20)
KL_BUDGET = 0.35
"""nats per token on neutral text: half of log 2"""
PERPLEXITY_BUDGET = 1.75
"""times the unsteered answers' perplexity on selection prompts; the report's limit is 2"""
SPAN = (0.27, 0.7)
"""layers of the many-layer vector, as shares of the depth: 8 to 20 of 30"""
SPAN_ALPHAS = (0.010, 0.0125, 0.015)
"""the pushes of thirteen layers add up, so each is a tenth of a single layer's"""
SPAN_RECIPES = ("mean_difference", "combined")
"""fitted ones; a third, "own_answers", is the last of them trained further"""
TRAINING: dict[str, Any] = {"alpha": 0.015, "steps": 40, "n_questions": 30, "learning_rate": 0.006, "divergence": 0.01}
"""how it is trained; chosen on selection prompts"""
TURNS = (0.5, 1.0)
"""half and full turn of the dial: at one of them, chosen on selection prompts, the bar is counted"""
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""strengths of the report, times the selected alpha"""
N_RANDOM = 10
KINDS = ("shared", "apart")
"""random directions of many layers: one for all layers, or one drawn for each layer.

Stated before the report prompts were touched: the bar of five times is counted against the ten *shared* ones, whose
pushes add up through the layers as the fitted ones do; ten drawn *apart* are reported beside them. Three vectors met
the report prompts before the one that ships, and missed the bar (3.0, 4.0 and at most 4.4 times); recipe, layers and
turn were chosen on selection prompts each time."""
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


def tone_answers(split: Any = "train") -> list[list[steering.Text]]:
    """Positive and negative tone sentences as answers to generic questions: what gradients are taken through."""
    sides = steering.pairs("tone", split)
    return [[(GENERIC[i % len(GENERIC)], str(text)) for i, text in enumerate(side)] for side in sides]


def combined_directions(model: Model, layers: Sequence[int], n_pairs: int | None = None, n_resamples: int = 100) -> Any:
    """Half-way between mean difference and gradient at several layers (``n_pairs``: from the first few only)."""
    positive, negative = (side[:n_pairs] for side in tone_answers())
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": SEED, "system": NO_SYSTEM}
    return steering.fit_directions(model, positive, negative, "combined", layers=layers, name="tone", **options)


def random_effects(
    model: Model, like: steering.Vector, alpha: float, seeds: Sequence[int], n: int = 30, **options: Any
) -> list[float]:
    """Effect on tone (mean at +alpha minus mean at -alpha) of random directions, on the first n selection prompts.

    ``options``: ``shared`` of ``steering.random_vector``, ``system`` of ``steering.continuations``.
    """
    asked, shared = steering.prompts("selection")[:n], options.pop("shared", False)
    settings = [(steering.random_vector(like, k, shared), s * alpha) for k in seeds for s in (1, -1)]
    rows = [s for s in settings for _ in asked]
    texts = steering.continuations(
        model, asked * len(settings), rows, NEW_TOKENS, 100, label="random directions", **options
    )
    tones = style.tone(texts).reshape(len(seeds), 2, -1).mean(-1)
    return (tones[:, 0] - tones[:, 1]).round(4).tolist()


def tone_vector(
    model: Model, n_resamples: int = 100, recipe: Any = "combined", n_pairs: int | None = None
) -> steering.ControlVector:
    """The tone direction after each layer of SPAN, over the tokens of the sentences as answers.

    ``recipe``: a method of ``steering.fit_directions``; ``n_pairs``: from the first few pairs only.
    """
    first, end = (round(share * model.n_layers) for share in SPAN)
    layers = range(max(1, first), max(2, end))
    options: dict[str, Any] = {"layers": layers, "name": "tone", "n_resamples": n_resamples, "seed": SEED}
    positive, negative = (side[:n_pairs] for side in tone_answers())
    found = steering.fit_directions(model, positive, negative, recipe, system=NO_SYSTEM, **options)
    return steering.ControlVector(tuple(found[layer] for layer in layers))


def own_vector(model: Model, start: steering.ControlVector) -> steering.ControlVector:
    """A vector trained further on the model's own answers to the train questions; 13 minutes, resumable."""
    key = json.dumps([checksum(start), TRAINING, model.hash, NEW_TOKENS, SEED], sort_keys=True)
    name = f"own-answers-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    checkpoint = assets.cache_dir() / "studies" / "steering_layers" / name
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"new_tokens": NEW_TOKENS, "system": NO_SYSTEM, "seed": SEED, "checkpoint": checkpoint}
    return train_vector(model, steering.prompts("train"), start, **TRAINING, **options)


def fit_attribute(model: Model, name: str, layer: int, method: Any = "mean_difference") -> steering.Direction:
    """The direction of one of the shipped contrast sets at one layer, from its train split."""
    positive, negative = steering.pairs(name, "train")
    return steering.fit_direction(model, positive, negative, method, layer=layer, name=name, seed=SEED)


def study_sweep() -> Path:
    """Layer x strength of tone on 30 selection prompts and 48 neutral sentences; ships vectors at the best layer.

    The tone vector of that one layer is ``tone-single``.
    """
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
        path = steering.DATA / "vectors" / ("tone-single" if name == "tone" else name)
        steering.save_direction(fit_attribute(model, name, int(best["layer"])), path)
    budgets = {"kl": KL_BUDGET, "perplexity": PERPLEXITY_BUDGET}
    stability = {d.layer: [round(x, 3) for x in _triple(d.stability)] for d in directions.values()}
    return write_table(
        "steering_sweep", model, time.time() - start, budgets=budgets, selected=best, stability=stability, rows=rows
    )


def _triple(interval: Any) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def study_layers() -> Path:
    """A little at many layers: three recipes x three strengths on the 60 selection prompts; ships the tone vector.

    Same budgets as the sweep's. Full strength is the largest effect within them. Then the half and the full turn are
    compared with ten random directions each, shared by the layers: the turn at which the vector stands out more
    (effect over the root mean square of theirs) is the one at which the report counts its bar.
    """
    start, model = time.time(), load_model()
    asked, neutral = steering.prompts("selection"), steering.prompts("neutral")
    vectors = {recipe: tone_vector(model, recipe=recipe) for recipe in SPAN_RECIPES}
    vectors["own_answers"] = own_vector(model, vectors["combined"])
    rows: list[dict[str, Any]] = []

    def measured(recipe: str, alpha: float) -> list[dict[str, Any]]:
        vector = vectors[recipe]
        key = [recipe, checksum(vector), alpha, model.hash, NEW_TOKENS, len(asked)]
        given: list[Any] = [vector, [alpha], asked, neutral, NEW_TOKENS, 100, NO_SYSTEM]
        found = resumed("steering_layers", key, steering.sweep, model, *given)
        return [{"recipe": recipe.replace("_", " "), **row} for row in found]

    for recipe in vectors:
        for alpha in SPAN_ALPHAS:  # one at a time: what gets interrupted is short
            rows += measured(recipe, alpha)
    best = steering.select(rows, KL_BUDGET, PERPLEXITY_BUDGET)
    recipe = next(r for r in vectors if r.replace("_", " ") == best["recipe"])
    vector = vectors[recipe]
    steering.save_direction(vector, steering.DATA / "vectors" / "tone")
    turns = []
    for step in TURNS:
        alpha = step * best["alpha"]
        [row] = [row for row in measured(recipe, alpha) if row["alpha"]]
        key = ["shared", recipe, checksum(vector), alpha, TURN_SEEDS, model.hash, NEW_TOKENS, len(asked)]
        others = resumed("steering_layers", key, _others, model, vector, alpha)
        turns.append(row | {"step": step, "random": others, "times": round(standing_out(row["effect"], others), 2)})
    before = vectors["combined"]
    stability = {d.layer: [round(x, 3) for x in _triple(d.stability)] for d in before.parts}
    kept = [
        round(float(x.vector @ y.vector), 3) for x, y in zip(vectors["own_answers"].parts, before.parts, strict=True)
    ]
    about = {
        "selected": best,
        "training": TRAINING,
        "cosines_with_start": kept,
        "turns": turns,
        "turn": max(turns, key=lambda t: t["times"])["step"],
    }
    return write_table("steering_layers", model, time.time() - start, **about, stability=stability, rows=rows)


def _others(model: Model, like: steering.Vector, alpha: float) -> list[float]:
    return random_effects(model, like, alpha, TURN_SEEDS, n=60, shared=True, system=NO_SYSTEM)


def standing_out(effect: float, others: Sequence[float]) -> float:
    """An effect as a multiple of the root mean square of random directions' effects."""
    return float(effect / np.sqrt(np.mean(np.square(others))))


def selected() -> tuple[steering.Vector, float]:
    """The shipped tone vector and the strength that was selected for it."""
    return steering.load_vector("tone"), read_table("steering_layers")["selected"]["alpha"]


def turn() -> float:
    """The part of the full turn at which the bar is counted, from the selection prompts."""
    return read_table("steering_layers")["turn"]


def single() -> tuple[steering.Vector, float]:
    """The best vector of one layer and its strength, from the sweep: what many layers are compared with."""
    return steering.load_vector("tone-single"), read_table("steering_sweep")["selected"]["alpha"]


def dial(model: Model) -> tuple[steering.ControlVector, float, bool]:
    """Tone vector, full strength, and whether it is the shipped one; another model gets one fitted on the spot."""
    table = read_table("steering_layers")
    if model.hash == table["provenance"]["model_hash"]:
        vector, alpha = selected()
        return steering.ControlVector(steering.parts_of(vector)), alpha, True
    return tone_vector(model, n_resamples=0), table["selected"]["alpha"], False


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
        loss = net(**batch.inputs, labels=batch.input_ids.masked_fill(~answer, -100)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with assets.atomic_path(folder) as partial:
        net.save_pretrained(str(partial))
    return folder


def half_lora(side: str) -> Path:
    """The same LoRA at half its strength (half of lora_alpha): a second point for comparisons at equal effect."""
    whole = lora(side)
    folder = whole.with_name(f"{side}-half")
    if not (folder / "adapter_config.json").exists():
        with assets.atomic_path(folder) as partial:
            shutil.copytree(whole, partial)
            config = json.loads((partial / "adapter_config.json").read_text())
            (partial / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2}))
    return folder


@contextmanager
def condition(name: str, plain: Model) -> Iterator[Model]:
    """The model of a condition that changes the model: ``lora +``, ``half-lora -``, ``steer X``, else plain."""
    if name.split()[0] in ("lora", "half-lora"):
        side = "positive" if name.endswith("+") else "negative"
        yield load_model(adapter=half_lora(side) if name.startswith("half") else lora(side))
    elif name.startswith(("steer", "single")) and (setting := setting_of(name)):
        with steering.steer(plain, *setting):
            yield plain
    else:
        yield plain


def setting_of(name: str) -> tuple[steering.Vector, float] | None:
    """Vector and strength of a condition: ``steer S``, ``single S``, or a random one of RANDOM_KINDS, ``KIND K S``.

    None: it steers nothing.
    """
    kind, *_, step = name.split()
    if not float(step):
        return None
    vector, alpha = single() if kind.startswith("single") else selected()
    if kind in RANDOM_KINDS:
        vector = steering.random_vector(vector, int(name.split()[1]), kind == "shared")
    return vector, float(step) * alpha


def answers_of(name: str, model: Model, questions: Sequence[str]) -> list[str]:
    """Greedy answers of one condition: one of ``setting_of``, or one of BASELINES and a sign, ``lora +``."""
    side = "positive" if name.endswith("+") else "negative"
    kind = name.split()[0]
    if kind in ("steer", "single", *RANDOM_KINDS):
        settings = [setting_of(name)] * len(questions)
        return steering.continuations(model, questions, settings, NEW_TOKENS, 100, system=NO_SYSTEM)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    texts = [""] * len(questions)
    with condition(name, model) as used_model:
        for start in progress(range(0, len(order), 50), name):
            rows = order[start : start + 50]
            if "lora" in kind:
                asked = [chat(used_model, questions[i], NO_SYSTEM) for i in rows]
            else:
                asked = [prompted(used_model, kind, side, questions[i]) for i in rows]
            for i, text in zip(rows, generate(used_model, asked, NEW_TOKENS), strict=True):
                texts[i] = text
    return texts


BASELINES = ("system", "few-shot", "lora")
"""``half-lora`` can be put beside them: the same adapter at half its strength"""
MAIN = [f"steer {s:.4g}" for s in STEPS] + [f"{k} {s}" for k in BASELINES for s in "-+"] + ["single -1", "single 1"]
RANDOM_KINDS = (*KINDS, "single-random")


def random_conditions() -> dict[str, int]:
    """Every random condition, and how many halves of the report prompts it answers: all where the bar is counted."""
    plan = {("shared", 1.0): 1, ("shared", turn()): 2, ("apart", turn()): 2, ("single-random", 1.0): 2}
    return {
        f"{kind} {k} {s * step:g}": halves
        for (kind, step), halves in plan.items()
        for k in range(N_RANDOM)
        for s in (-1, 1)
    }


def layers_of(vector: steering.Vector) -> list[int]:
    """The layers after which a vector is added."""
    return [part.layer for part in steering.parts_of(vector)]


def checksum(vector: steering.Vector) -> str:
    """Of layers, numbers and units, for the cache."""
    found = hashlib.sha256()
    for part in steering.parts_of(vector):
        found.update(f"{part.layer} {part.scale:.6g} ".encode() + part.vector.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def used_by(name: str) -> list[Any]:
    """What a condition depends on, for the cache: its vector and strength; empty if none."""
    steers = name.split()[0] in ("steer", "single", *RANDOM_KINDS) and setting_of(name)
    return [checksum(steers[0]), steers[1]] if steers else []


def _losses(model: Model, questions: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
    return [x.tolist() for x in steering.answer_losses(model, questions, answers, 50, NO_SYSTEM)]


RATED = 1000
"""rated sentences of each source that the second ruler is fitted on; as many others check it"""
RULER = steering.DATA / "vectors" / "second-ruler.safetensors"


def study_ruler() -> Path:
    """A ruler of tone that no vector was trained against, and its rank correlation with people on other sentences.

    It reads the unsteered model's residual stream, averaged over a text, half-way up: ridge regression on sentences
    that people rated, -4 to 4 (``style.human_ratings``). Shipped are the weights for [mean residual stream, 1].
    """
    start, model, rng = time.time(), load_model(), np.random.default_rng(SEED)
    fitted, checks = [], {}
    for source in style.RATED:
        texts, rating = style.human_ratings(source)
        chosen = rng.choice(len(texts), 2 * RATED, replace=False)
        read = read_by(model, [texts[i] for i in chosen])
        fitted.append((read[:RATED], torch.from_numpy(rating[chosen[:RATED]]).to(read)))
        checks[source] = (read[RATED:], rating[chosen[RATED:]])
    x, y = (torch.cat(side) for side in zip(*fitted, strict=True))
    spread = x.std(0).clamp(min=1e-6)
    spread[-1] = 1.0  # the constant
    scaled = x / spread
    penalty = 0.1 * len(x) * torch.eye(len(spread)).to(x)
    penalty[-1, -1] = 0
    weights = torch.linalg.solve(scaled.T @ scaled + penalty, scaled.T @ y) / spread
    with assets.atomic_path(RULER) as partial:
        save_file({"weights": weights.contiguous()}, partial)
    rho = {source: round(spearman((r @ weights).numpy(), v).rho.value, 3) for source, (r, v) in checks.items()}
    about: dict[str, Any] = {"layer": model.n_layers // 2, "rated": RATED, "rank_correlation": rho}
    return write_table("steering_ruler", model, time.time() - start, **about)


def read_by(model: Model, texts: Sequence[str]) -> torch.Tensor:
    """What the second ruler reads of each text: mean residual stream half-way up, and a constant; no chat."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    found = steering.pooled(model, [texts[i] or "." for i in order], [model.n_layers // 2])[0][0].double()
    read = torch.empty_like(found)
    read[order] = found
    return torch.cat([read, torch.ones(len(read), 1).to(read)], 1)


def read_tone(model: Model, texts: Sequence[str]) -> list[float]:
    """The second ruler's rating of each text, -4 to 4."""
    weights = load_file(RULER)["weights"].to(model.device)
    return (read_by(model, texts) @ weights).cpu().numpy().round(4).tolist()


def tone_row(model: Model, name: str) -> dict[str, Any]:
    """One condition on the 200 report prompts: tone, losses, relevance (of the first 50) and the answers."""
    questions = steering.prompts("report")
    texts = answers_of(name, model, questions)
    row: dict[str, Any] = {"condition": name, "tone": style.tone(texts).round(4).tolist(), "answers": texts}
    row["second"] = read_tone(model, texts)
    losses, counts = steering.answer_losses(model, questions, texts, 50, NO_SYSTEM)
    few, others = slice(0, 50), [*questions[1:], questions[0]]  # relevance is as costly as generation
    unrelated, _ = steering.answer_losses(model, others[few], texts[few], 50, NO_SYSTEM)
    relevance = (unrelated - losses[few]) / np.maximum(counts[few], 1)
    row |= {"loss": losses.round(3).tolist(), "tokens": counts.tolist()}
    return row | {"relevance": relevance.round(4).tolist()}


def random_tones(model: Model, name: str, part: int) -> dict[str, list[float]]:
    """Tone under a random direction, on one half of the report prompts; of the shared ones by both rulers."""
    texts = answers_of(name, model, steering.prompts("report")[100 * part : 100 * (part + 1)])
    found = {"tone": style.tone(texts).round(4).tolist()}
    return found | ({"second": read_tone(model, texts)} if name.startswith("shared") else {})


def tone_key(model: Model, name: str, *part: int) -> list[Any]:
    """What a row of ``study_tone`` depends on."""
    return [name, *part, model.hash, NEW_TOKENS, len(steering.prompts("report")), NO_SYSTEM, *used_by(name)]


def study_tone() -> Path:
    """Answers to the 200 report prompts under every condition, with tone, perplexity and relevance."""
    start, model = time.time(), load_model()
    vector, alpha = selected()
    rows = [resumed("steering_tone", tone_key(model, name), tone_row, model, name) for name in MAIN]
    for name, halves in random_conditions().items():
        keys = [tone_key(model, name, part) for part in range(halves)]
        found = [resumed("steering_tone", key, random_tones, model, name, i) for i, key in enumerate(keys)]
        rows.append({"condition": name} | {ruler: [v for f in found for v in f[ruler]] for ruler in found[0]})
    about: dict[str, Any] = {"layers": layers_of(vector), "alpha": alpha}
    about["second_ruler"] = read_table("steering_ruler")["rank_correlation"]
    about["prompts"] = steering.prompts("report")
    return write_table("steering_tone", model, time.time() - start, **about, rows=rows)


# --- sharper directions -------------------------------------------------------------------------------


def sharper_direction(model: Model, recipe: str, layer: int) -> steering.Direction:
    """``combined``, or ``trained``: the combined direction trained further for the strongest push of the selection."""
    key = [recipe, "vector", layer, CLOSER_ALPHAS[-1], model.hash]
    found = resumed("steering_sweep", key, _fitted, model, recipe, layer)
    found |= {"vector": torch.tensor(found["vector"])}
    found |= {"stability": Interval(**found["stability"]) if found["stability"] else None}
    return steering.Direction(**found)


def _fitted(model: Model, recipe: str, layer: int) -> dict[str, Any]:
    if recipe == "combined":
        d = combined_directions(model, [layer])[layer]
    else:
        first = sharper_direction(model, "combined", layer)
        positive, negative = tone_answers()
        push = CLOSER_ALPHAS[-1]
        d = steering.train_direction(model, positive, negative, first, push, system=NO_SYSTEM, seed=SEED)
    return asdict(replace(d, vector=torch.zeros(0))) | {"vector": d.vector.tolist()}


def choose(rows: Sequence[Mapping[str, Any]], control: Mapping[int, Sequence[float]]) -> Mapping[str, Any]:
    """Layer, then strength, both within the budgets.

    The layer with the largest effect at the strongest setting as a multiple of what random directions do there
    (root mean square); at that layer the strength with the largest effect.
    """
    strongest = max(row["alpha"] for row in rows)
    plain = min(row["perplexity"] for row in rows if row["alpha"] == 0)
    at = [row for row in rows if row["alpha"] == strongest]
    allowed = [r for r in at if r["kl"] <= KL_BUDGET and r["perplexity"] <= PERPLEXITY_BUDGET * plain]

    def ratio(row: Mapping[str, Any]) -> float:
        return standing_out(row["effect"], control[int(row["layer"])])

    layer = max(allowed or at, key=ratio)["layer"]
    return steering.select([row for row in rows if row["layer"] == layer], KL_BUDGET, PERPLEXITY_BUDGET)


def study_sharper() -> Path:
    """Sharper directions at one layer, compared and chosen on 30 selection prompts: a null result, kept as one."""
    start, model = time.time(), load_model()
    asked, neutral = steering.prompts("selection")[:30], steering.prompts("neutral")
    recipes = {recipe: {layer: sharper_direction(model, recipe, layer) for layer in CLOSER} for recipe in RECIPES}
    rows: list[dict[str, Any]] = []
    control: dict[int, list[float]] = {}
    for layer in progress(list(CLOSER), "layers"):
        for recipe in RECIPES:
            key = [recipe, layer, CLOSER_ALPHAS, model.hash, NEW_TOKENS]
            given: list[Any] = [recipes[recipe][layer], CLOSER_ALPHAS, asked, neutral, NEW_TOKENS, 100, NO_SYSTEM]
            found = resumed("steering_sweep", key, steering.sweep, model, *given)
            rows += [{"recipe": recipe, **row} for row in found]
        strongest = CLOSER_ALPHAS[-1]
        key = ["random", layer, strongest, SELECTION_SEEDS, model.hash, NEW_TOKENS]
        given = [recipes["combined"][layer], strongest, SELECTION_SEEDS]
        control[layer] = resumed("steering_sweep", key, random_effects, model, *given)
    best = choose(rows, control)
    chosen = recipes[best["recipe"]][int(best["layer"])]
    steering.save_direction(chosen, steering.DATA / "vectors" / "tone-sharper")
    return write_table("steering_sharper", model, time.time() - start, selected=best, random=control, rows=rows)


# --- with sampling ------------------------------------------------------------------------------------

SEEDS = (0, 1, 2, 3, 4)
TEMPERATURE = 0.7
SAMPLED = ("steer -1", "steer 0", "steer 1")


def sampled_prompts() -> list[str]:
    """Every fifth of the report prompts: 40."""
    return steering.prompts("report")[::5]


def sampled_tones(name: str, model: Model, seed: int) -> list[float]:
    """Tone of one sampled answer to each of ``sampled_prompts`` under one condition."""
    asked = sampled_prompts()
    settings = [setting_of(name)] * len(asked)
    texts = steering.continuations(model, asked, settings, NEW_TOKENS, 100, TEMPERATURE, 100 * seed, system=NO_SYSTEM)
    return style.tone(texts).round(4).tolist()


def study_seeds() -> Path:
    """Sampled answers: 40 report prompts x five seeds, at -alpha, 0 and +alpha."""
    start, model = time.time(), load_model()
    vector, alpha = selected()
    rows = []
    for name in progress(SAMPLED, "conditions"):
        base = [model.hash, NEW_TOKENS, TEMPERATURE, len(sampled_prompts()), *used_by(name)]
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
    """62 unrelated requests with a helpful answer to each (the refusal pairs' helpful side, train split)."""
    answered = steering.pairs("refusal", "train")[1]
    return [t[0] for t in answered], [t[1] for t in answered]


def costs_of(name: str, plain: Model) -> dict[str, list[float]]:
    """Per-item losses and hits of one condition.

    A prompt has no place in front of plain text and of a question without a chat: there it costs nothing.
    """
    kind, side = name.split()[0], "positive" if name.endswith("+") else "negative"
    system = SYSTEM[side] if kind == "system" else NO_SYSTEM
    asked: Sequence[Any]
    asked, replies = instructions()
    if kind == "few-shot":
        asked = [few_shot(side, question) for question in asked]
    with condition(name, plain) as model:
        reply, n_reply = steering.answer_losses(model, asked, replies, 25, system)
        result = {"reply_loss": reply, "reply_tokens": n_reply}
        if kind not in ("system", "few-shot"):
            text, n_text = text_losses(model, held_texts(), max_tokens=96)
            result |= {"text_loss": text, "text_tokens": n_text}
        rounded = {k: np.round(v, 3).tolist() for k, v in result.items()}
        return rounded | ({"choice": choice_right(model)} if name in CHOICES else {})


def study_costs() -> Path:
    """Other skills under steering, LoRA and prompts: held-out text, unrelated instructions, multiple choice."""
    start, model = time.time(), load_model()
    vector, alpha = selected()
    rows = []
    for name in progress(COSTS, "conditions"):
        key = [name, model.hash, *used_by(name)]
        rows.append({"condition": name} | resumed("steering_costs", key, costs_of, name, model))
    about = {"layers": layers_of(vector), "alpha": alpha}
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


def facts_kept(model: Model, vector: steering.Vector, alphas: Sequence[float]) -> list[tuple[list[str], list[bool]]]:
    """At each strength: steered answers to FACTS, and whether each still holds its fact."""
    settings = [(vector, alpha) for alpha in alphas for _ in FACTS]
    texts = steering.continuations(model, list(FACTS) * len(alphas), settings, 30, 100)
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
        raise steering.SteeringError(
            f"No setting between those measured has the effect {target:.2f}; theirs are "
            f"{', '.join(f'{e:.2f}' for e in effects)}. Measure a stronger one, or compare at a smaller effect."
        )
    i = above[0]
    if i == 0:
        return points[0][1]
    (low, before), (high, after) = points[i - 1], points[i]
    weight = (target - low) / (high - low)
    return (1 - weight) * before + weight * after


TABLES = ("sweep", "sharper", "layers", "tone", "seeds", "costs")
"""what notebook 05 draws: data/studies/steering_NAME.json"""

STUDIES_OF_STEERING = {
    "steering-sweep": study_sweep,
    "steering-sharper": study_sharper,
    "steering-layers": study_layers,
    "steering-ruler": study_ruler,
    "steering-tone": study_tone,
    "steering-seeds": study_seeds,
    "steering-costs": study_costs,
}
