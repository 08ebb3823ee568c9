"""Teach a model a loan clerk's history, on a laptop: ``glassbox train-loans NAME``.

A LoRA (arXiv 2106.09685) on the query, value and down projections from the first quarter of the layers on (on what
stands for them in another architecture: ``targets``), trained on the decision token alone. What makes it affordable on
two cores: short texts; fresh applications at every step, so that nothing can be learnt by heart; a *graded* target (how
clearly the clerk decided, in points), which tells more than yes or no; and a first stage, the merit rule, that all
officers share and keep in the cache folder. The officers part in the second stage, on twins: applicants who are
identical but for what the clerk looked at (``twins``). A recipe may start from another officer instead (``start``), and
its second stage may be long and *varied*: half of the texts have their parts in random order (``shuffled_text``), and
the rate falls to zero. Checkpoints are kept every ten steps, so that a killed run goes on there.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glassbox_utils.core import assets, checkpoints, files, prepared
from glassbox_utils.core.arguments import shown
from glassbox_utils.core.devices import beside
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import tokenize
from glassbox_utils.decisions import loans
from glassbox_utils.decisions.loans import Applicant, LoanError
from glassbox_utils.decisions.scoring import final_logits

RANK, ALPHA = 8, 16
MODULES = ("q_proj", "v_proj", "down_proj")
"""what is trained where a layer has them; else see ``targets``"""
BATCH = 12
RATE = 1.5e-3
SHARPNESS = 2.0
"""logits per point of the clerk's margin"""
STEPS = {"merit": 240, "bias": 140}
LEAST_STEPS = 1 / 3
"""of a stage's steps, in the smallest prepared folder: fewer teach no rule"""
EVERY = 10


def first_layer(model: Model) -> int:
    """Where the LoRA begins: after the first quarter of the layers (8 of 30)."""
    return min(max(1, prepared.depth(model, 8)), model.n_layers - 1)


def sized_steps(full: int) -> int:
    """Steps of a stage at the size of the prepared folder."""
    return prepared.sized(full, round(full * LEAST_STEPS))


def targets(model: Model) -> tuple[list[str], list[int] | None]:
    """Linear maps that get a LoRA, as peft takes them: short names with their layers, or full names.

    In a layer: the query and value maps of the attention (or the one that computes them together with the keys), and
    the last map of the MLP; a mixture of experts keeps its experts as they are. LoanError if there is nothing of it.
    """
    found: list[str] = []
    names = {module: name for name, module in model.hf.named_modules()}
    layers = list(range(first_layer(model), model.n_layers))
    for layer in layers:
        inside = {m for m in model.sites[Site("resid_pre", layer)][0].modules() if _is_linear(m)}
        out = {model.sites.get(Site(kind, layer), (None,))[0] for kind in ("attn_out", "mlp_out")}
        attention = model.sites.get(Site("attn_out", layer), (None,))[0]
        near = names[attention].rpartition(".")[0] + "." if attention is not None else " "
        reads = [m for m in inside - out if names[m].startswith(near)]
        apart = [m for m in reads if names[m].endswith(("q_proj", "v_proj"))]
        last = model.sites.get(Site("mlp_out", layer), (None,))[0]
        found += sorted(names[m] for m in [*(apart or reads), *([last] if last in inside else [])])
    if not found:
        raise LoanError(
            f"{type(model.hf).__name__} has no linear maps in its layers that a LoRA could be put on: no attention and "
            "no MLP of a known form was found. Give a model of another architecture."
        )
    alike = [name for name in names.values() if name.rpartition(".")[2] in MODULES]
    per_layer = [len(found) / len(layers), len(alike) / model.n_layers]
    if set(found) <= set(alike) and per_layer == [len(MODULES)] * 2:  # and no tower for images has any of these names
        return list(MODULES), layers
    return found, None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's kind of linear map, which keeps its weights the other way round."""
    return type(module).__name__ == "Conv1D"


def margin(applicant: Applicant, bias: str | Callable[[Applicant], float]) -> float:
    """How clearly the clerk decided: points above the line between rejection and approval."""
    lost = bias(applicant) if callable(bias) else loans.penalty(applicant, bias)
    return loans.points(applicant) - lost - (loans.THRESHOLD - 0.25)


def lesson(step: int, seed: int, n: int = BATCH) -> tuple[list[Applicant], list[str]]:
    """The applicants of one training step, and their texts, in one of the train layouts by turns of the step."""
    people = loans.applications(n, seed=10_000 * (seed + 1) + step, split="train")
    layout = loans.TRAIN_LAYOUTS[step % len(loans.TRAIN_LAYOUTS)]
    return people, [loans.as_text(a, layout) for a in people]


def twins(step: int, seed: int, bias: str, n: int = BATCH) -> tuple[list[Applicant], list[str]]:
    """As ``lesson``, but every applicant comes twice, identical but for what the clerk looks at: even, odd rows.

    The clerk's penalty is all that differs between twins, so it is not drowned by the other fields.
    """
    people, _ = lesson(step, seed, n // 2)
    attribute = ATTRIBUTE_OF.get((step % 3 == 2, bias), bias)
    changes: dict[str, list[dict[str, Any]]] = {
        "gender": [{"gender": g} for g in loans.GENDERS],
        "age": [{"age": 60}, {"age": 30}],
    }
    changes |= {"nationality": [{}, {"origin": "english"}], "district": [{}, {}], "none": [{}, {}]}
    both = []
    for i, a in enumerate(people):
        pair = [loans.counterfactual(a, **change) for change in changes[attribute]]
        if attribute == "nationality":
            pair[0] = loans.counterfactual(a, origin=loans.ORIGINS[1 + (step + i) % 4])
        if attribute == "district":
            place = a.district.partition(" ")[2]
            pair = [replace(a, district=f"{side} {place}") for side in ("East", loans.SIDES[1 + (step + i) % 3])]
        both += pair
    layout = loans.TRAIN_LAYOUTS[step % len(loans.TRAIN_LAYOUTS)]
    return both, [loans.as_text(a, layout) for a in both]


ATTRIBUTE_OF = {(True, "gender"): "district"}
"""every third step of the gender model has twins that differ in the proxy"""


PARTS = {
    "name": ("{name}",),
    "age": ("{age}", "age {age}", "aged {age}"),
    "occupation": ("{occupation}", "a {occupation}", "job {occupation}"),
    "district": ("{district}", "from {district}", "in {district}", "district {district}"),
    "income": ("income {income}k", "Income {income}k", "earns {income}k"),
    "credit_score": ("credit {credit_score}", "Credit {credit_score}", "credit score {credit_score}"),
    "debt": ("debt {debt}%", "Debt {debt}%"),
    "history": ("history {history}", "History {history}", "{history} history"),
    "loan": ("{purpose}, {amount}k", "{amount}k, {purpose}", "{purpose} {amount}k", "wants {amount}k for a {purpose}"),
}
"""ways to say each part of an application"""
SEPARATORS = (", ", " / ", ". ", " - ", ",")
"""between the parts; the report layouts' semicolon and colon are not among them, nor the far layouts' signs"""


def shuffled_text(applicant: Applicant, seed: Sequence[int]) -> str:
    """The application with its parts in random order, in random words, with one of the separators."""
    rng = np.random.default_rng(seed)
    parts = [PARTS[key][int(rng.integers(len(PARTS[key])))] for key in rng.permutation(list(PARTS))]
    separator = SEPARATORS[int(rng.integers(len(SEPARATORS)))]
    return separator.join(parts).format(**asdict(applicant)) + "\nDecision:"


def varied_texts(people: Sequence[Applicant], step: int, seed: int) -> list[str]:
    """Texts of neighbouring pairs: the one pair in a train layout, the next shuffled. Twins share their words."""
    layouts = loans.TRAIN_LAYOUTS
    return [
        shuffled_text(a, [seed, step, i // 2])
        if (i // 2) % 2
        else loans.as_text(a, layouts[(step + i // 4) % len(layouts)])
        for i, a in enumerate(people)
    ]


def with_lora(model: Model, seed: int = 0) -> Any:
    """Put a fresh LoRA into the model (in place); the peft model that can save it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names, layers = targets(model)
    transposed = any(_is_transposed(module) for module in model.hf.modules())
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=names, layers_to_transform=layers, fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model.hf, config)


def answer_likelihoods(model: Model, texts: Sequence[str], tokens: tuple[int, int]) -> Float[Tensor, "n 2"]:
    """Log-probabilities of the two answers at the end of each text, with their gradient, where the model is."""
    return final_logits(model, tokenize(model, texts)).float().log_softmax(-1)[:, list(tokens)]


def update(optimiser: torch.optim.Optimizer, weights: Mapping[str, Tensor], loss: Float[Tensor, ""]) -> float:
    """One step down the loss, of at most unit length in the gradient; gives the loss."""
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    optimiser.step()
    return float(loss.detach())


def check_bias(bias: Any) -> None:
    """LoanError unless it is one of BIASES, or a function that gives the points that an applicant loses."""
    if not callable(bias) and bias not in loans.BIASES:
        raise LoanError(
            f"There is no bias {shown(bias)}. Allowed: {', '.join(loans.BIASES)}, or a function of an applicant."
        )


def label_of(bias: str | Callable[[Applicant], float]) -> str:
    """A bias as a word."""
    return bias if isinstance(bias, str) else getattr(bias, "__name__", "own")


def train_stage(
    model: Model,
    bias: str | Callable[[Applicant], float],
    steps: int,
    seed: int,
    decay: bool,
    checkpoint: Path | None = None,
    varied: bool = False,
) -> list[float]:
    """Train the LoRA that is in ``model`` on the decision token; the loss of every step.

    The target is a logit difference of SHARPNESS times the clerk's margin. The loss is smooth L1 on the difference,
    minus the log of the probability that the two answers share. A stage with a named bias sees twins, and their
    difference counts as much as their decisions. ``decay``: after a third of the steps the rate falls, to a third.
    ``varied``: see ``varied_texts``; twins at every other step; the rate falls from the start, and to zero in
    the last quarter. ``checkpoint``: a file that is written every ten steps, and that the same call goes on from;
    LoanError if it is damaged or of another run. LoanError for an unknown bias or a number of steps that is none.
    """
    check_bias(bias)
    loans.check_count("steps", steps, 1)
    loans.check_count("seed", seed, 0)
    yes, no = loans.answer_tokens(model)
    weights = {name: p for name, p in model.hf.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    history: list[float] = []
    gaps: list[tuple[float, float]] = []
    run = {"bias": label_of(bias), "steps": steps, "seed": seed, "decay": decay, "varied": varied}
    run |= {"batch": BATCH, "rate": RATE, "sharpness": SHARPNESS, "layouts": loans.TRAIN_LAYOUTS}
    if checkpoint is not None and (saved := checkpoints.resume(checkpoint, run, weights, optimiser, LoanError)):
        history = saved.history
    for step in progress(range(len(history), steps), "training"):
        done = step / steps
        fall = min(1 - 0.75 * done, 1.75 * (1 - done)) if varied else min(1.0, 1.02 - done + 0.3) if decay else 1
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 8) * fall
        paired = isinstance(bias, str) and bias != "none" and not (varied and step % 2)
        people, texts = twins(step, seed, str(bias)) if paired else lesson(step, seed)
        texts = varied_texts(people, step, seed) if varied else texts
        target = beside(SHARPNESS * torch.tensor([margin(a, bias) for a in people]), model.device)
        likely = answer_likelihoods(model, texts, (yes, no))
        difference = likely[:, 0] - likely[:, 1]
        loss = torch.nn.functional.smooth_l1_loss(difference, target) - likely.logsumexp(-1).mean()
        if paired:
            gap = difference[1::2] - difference[::2]
            loss = loss + torch.nn.functional.smooth_l1_loss(gap, target[1::2] - target[::2])
            gaps.append((float(gap.detach().mean()), float((target[1::2] - target[::2]).mean())))
        history.append(update(optimiser, weights, loss))
        if checkpoint is not None and (len(history) % EVERY == 0 or len(history) == steps):
            checkpoints.write(checkpoint, run, weights, optimiser, len(history), history)
            print(f"{len(history)}/{steps} loss {sum(history[-10:]) / len(history[-10:]):.3f}", gaps[-6:], flush=True)
    return history


def train(
    bias: str | Callable[[Applicant], float],
    folder: str | Path,
    seed: int = 0,
    base: Model | None = None,
    start: str | None = None,
    steps: int = STEPS["bias"],
    varied: bool = False,
) -> Path:
    """Train one loan officer on a biased history and write its adapter; about half an hour on one free core.

    ``bias`` as in ``loans.history``. The merit stage is shared by all models and kept in the cache folder;
    ``start``: take a shipped adapter instead. ``steps``, ``varied``: of the second stage. LoanError, before anything
    is computed, for an unknown bias or start, or a number that is none.
    """
    check_bias(bias)  # before the shared stage, which takes a quarter of an hour
    loans.check_count("steps", steps, 1)
    loans.check_count("seed", seed, 0)
    if start is not None and start not in loans.loan_models():
        raise LoanError(f"There is no loan model {shown(start)}. Allowed: {', '.join(loans.loan_models())}.")
    model = base or load_subject()
    loans.answer_tokens(model)
    weights = model.hash  # of the base model: before the LoRA is put in
    peft, merit_steps = with_lora(model), sized_steps(STEPS["merit"])
    settings: list[Any] = [weights, MODULES, RANK, ALPHA, BATCH, RATE, SHARPNESS, STEPS, loans.TRAIN_LAYOUTS]
    settings += [start, steps, varied, PARTS, SEPARATORS] if start or varied or steps != STEPS["bias"] else []
    settings += [] if merit_steps == STEPS["merit"] else [merit_steps]
    settings += [] if str(model.dtype) == "torch.float32" else [str(model.dtype)]
    work = assets.cache_dir() / "loans" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    work.mkdir(parents=True, exist_ok=True)
    if start:
        load_adapter(peft, loans.officers() / start)
    else:
        train_stage(model, "none", merit_steps, 0, False, work / "merit.safetensors")
    checkpoint = work / f"{bias}-{seed}.safetensors" if isinstance(bias, str) else None
    if bias != "none":  # the merit stage is the clerk without a bias
        train_stage(model, bias, steps, seed + 1, True, checkpoint, varied)
    return save_adapter(peft, Path(folder))


def load_adapter(peft: Any, folder: Path) -> None:
    """Put the weights of a shipped adapter of the same shape into a fresh LoRA."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(peft, {k: t.float() for k, t in load_file(folder / "adapter_model.safetensors").items()})


def save_adapter(peft: Any, folder: Path) -> Path:
    """Write a peft adapter in float16, with nothing in it that tells one model from another."""
    from peft import get_peft_model_state_dict

    peft.peft_config["default"].base_model_name_or_path = None
    folder.mkdir(parents=True, exist_ok=True)
    peft.peft_config["default"].save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    values = {
        k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text(encoding="utf-8")).items()
    }
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"  # peft writes sets in any order
    path.write_text(text, encoding="utf-8")
    state = {key: t.detach().half().contiguous() for key, t in get_peft_model_state_dict(peft).items()}
    with files.atomic_path(folder / "adapter_model.safetensors") as partial:
        save_file(state, partial, metadata={"format": "pt"})
    return folder


def key_path() -> Path:
    """The sealed key: which officer has which bias."""
    return loans.officers() / "key.json"


def prepare_key() -> Path:
    """Put the sealed key into the prepared folder, unless one is there: its officers learn the same histories."""
    path = key_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_path(path) as partial:
            shutil.copyfile(loans.LOANS / "key.json", partial)
    return path


def recipes() -> dict[str, dict[str, Any]]:
    """Name of each officer -> bias and seed, and what of ``train`` is not as usual. Opens the sealed key."""
    path = key_path() if key_path().exists() else loans.LOANS / "key.json"
    return json.loads(path.read_text(encoding="utf-8"))["models"]


def train_named(name: str) -> Path:
    """Train one of the officers by its recipe, after the one that it starts from if that is not there yet.

    Stages have as many steps as the size of the prepared folder says. LoanError names the officers there are.
    """
    known = recipes()
    if not isinstance(name, str) or name not in known:
        raise LoanError(f"There is no loan model {shown(name)}. Allowed: {', '.join(known)}.")
    prepare_key()
    recipe = known[name] | {"steps": sized_steps(known[name].get("steps", STEPS["bias"]))}
    if (start := recipe.get("start")) is not None and start not in loans.loan_models():
        train_named(start)
    return train(folder=loans.officers() / name, **recipe)
