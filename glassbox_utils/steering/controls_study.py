"""What belongs beside a trained vector: ``glassbox study steering-controls``.

Five vectors trained alike on shuffled valences, one vector after a single layer, a LoRA with the same reward, and the
vector itself. All are trained at one size, smaller than the shipped vector's (REDUCED), so that like is compared with
like, and answer the report prompts once. What is done is kept in the cache folder and not done again.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassbox_utils.core import assets, checkpoints, files, prepared
from glassbox_utils.core.losses import answer_losses
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.studies import SEED, read_table, resumed, write_table
from glassbox_utils.core.text import chat, generate
from glassbox_utils.steering import contrast, reward, ruler_study, study, style
from glassbox_utils.steering.apply import continuations
from glassbox_utils.steering.report_study import projections, report_prompts
from glassbox_utils.steering.training import backward, train_vector
from glassbox_utils.steering.vectors import ControlVector, SteeringError, Vector, fingerprint, parts_of

REDUCED = {"steps": 20, "n_questions": 12}
"""of all that is compared here; the shipped vector has study.TRAINING"""
SHUFFLES = (0, 1, 2, 3, 4)
TRAINED_IN = "bfloat16"
"""number type of the model that writes and reads in training; what is measured is in float32"""
LORA_RATE = 1e-3
"""AdamW, rank 4 on queries and values, as the LoRA that reads written sentences"""


def sizes() -> dict[str, int]:
    """Steps, and questions a step; fewer where the folder's size is small."""
    return {name: prepared.sized(REDUCED[name], least) for name, least in study.LEAST_TRAINING.items()}


def folder() -> Path:
    """Where runs are kept that may be interrupted."""
    found = assets.cache_dir() / "studies" / "steering_controls"
    found.mkdir(parents=True, exist_ok=True)
    return found


def trained(model: Model, kind: str) -> tuple[Vector, float]:
    """A vector and its full strength: ``same size``, ``shuffled K``, or ``one layer``; resumable.

    All begin at the same fitted directions; ``one layer`` at that of the sweep's layer, pushed by the sweep's strength.
    """
    start: ControlVector = study.tone_vector(model, n_resamples=0)
    alpha = study.selected()[1]
    if kind == "one layer":
        chosen = read_table("steering_sweep")["selected"]
        layer, alpha = int(chosen["layer"]), chosen["alpha"]
        start = ControlVector((study.combined_directions(model, [layer], n_resamples=0)[layer],))
    valence = torch.stack([reward.valences(model.tokenizer)] * 2)
    if kind.startswith("shuffled"):
        valence = reward.shuffled(valence, int(kind.split()[1]))
    how = study.TRAINING | sizes() | {"alpha": alpha}
    key = json.dumps([kind, fingerprint(start), how, model.hash, study.NEW_TOKENS, SEED], sort_keys=True)
    checkpoint = folder() / f"{kind.replace(' ', '-')}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    options: dict[str, Any] = {"new_tokens": study.NEW_TOKENS, "system": study.NO_SYSTEM, "seed": SEED}
    found = train_vector(
        load_subject(dtype=TRAINED_IN),
        contrast.prompts("train"),
        start,
        **how,
        **options,
        valence=valence,
        checkpoint=checkpoint,
    )
    return found, alpha


def rewarded_lora(sign: int) -> Path:
    """A LoRA trained on its own answers with the same reward, at one end of the dial (1 or -1); resumable.

    As many steps and answers as the vectors have at this end; the price of divergence is the same.
    """
    from peft import LoraConfig, get_peft_model

    if sign not in (1, -1):
        raise SteeringError(f"The sign is {sign!r}. Allowed: 1 (plus) or -1 (minus).")
    size, mine = sizes(), prepared.card().model_hash
    about = {"sign": sign, **size, "model": mine, "rate": LORA_RATE, "seed": SEED, "recipe": study.TRAINING}
    name = f"lora{sign:+d}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}"
    done = folder() / name
    if (done / "adapter_config.json").exists():
        return done
    model = load_subject(dtype=TRAINED_IN)
    torch.manual_seed(SEED)
    net = get_peft_model(model.hf, LoraConfig(r=4, lora_alpha=8, target_modules=projections(model)))
    weights = {n: p for n, p in net.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(list(weights.values()), lr=LORA_RATE)
    checkpoint = folder() / f"{name}.safetensors"
    saved = checkpoints.resume(checkpoint, about, weights, optimiser, SteeringError)
    ends, asked = torch.stack([reward.valences(model.tokenizer)] * 2), contrast.prompts("train")
    for step in progress(range(saved.step if saved else 0, size["steps"]), f"LoRA with the reward, {sign:+d}"):
        rng = np.random.default_rng([SEED, step])
        now = [asked[i] for i in rng.permutation(len(asked))[: size["n_questions"]]]
        texts = [chat(model, q, study.NO_SYSTEM) for q in now]
        said = generate(model, texts, study.NEW_TOKENS, 1.0, int(rng.integers(2**31)))
        rows = [(q, a, None) for q, a in zip(now, said, strict=True) if a.strip()]
        options: dict[str, Any] = {"system": study.NO_SYSTEM, "weight": 1 / len(now)}
        backward(model, rows, ends, sign, study.TRAINING["divergence"], nullcontext, net.disable_adapter, **options)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 10 == 0 or step + 1 == size["steps"]:
            checkpoints.write(checkpoint, about, weights, optimiser, step + 1)
    with files.atomic_path(done) as partial:
        net.save_pretrained(str(partial))
    return done


def measured(plain: Model, texts: list[str]) -> dict[str, Any]:
    """What is kept of a condition's answers to the report prompts: tone by both rulers, loss, the answers."""
    losses, counts = answer_losses(plain, report_prompts(), texts, 50, study.NO_SYSTEM)
    row: dict[str, Any] = {"tone": style.tone(texts).round(4).tolist(), "second": ruler_study.read_tone(plain, texts)}
    return row | {"loss": losses.round(3).tolist(), "tokens": counts.tolist(), "answers": texts}


def vector_rows(model: Model, kind: str) -> list[dict[str, Any]]:
    """Both ends of one trained vector."""
    vector, alpha = trained(model, kind)
    asked = report_prompts()
    rows = []
    for step in (-1, 1):
        settings = [(vector, step * alpha)] * len(asked)
        texts = continuations(model, asked, settings, study.NEW_TOKENS, 100, system=study.NO_SYSTEM, label=kind)
        about = {"condition": f"{kind} {step}", "layers": [p.layer for p in parts_of(vector)], "alpha": alpha}
        rows.append(about | measured(model, texts))
    return rows


def lora_rows(model: Model) -> list[dict[str, Any]]:
    """Both ends of the LoRA with the reward."""
    rows = []
    for sign in (-1, 1):
        other = load_subject(adapter=rewarded_lora(sign))
        texts: list[str] = []
        asked = report_prompts()
        for first in progress(range(0, len(asked), 50), f"rewarded lora {sign:+d}"):
            chats = [chat(other, q, study.NO_SYSTEM) for q in asked[first : first + 50]]
            texts += generate(other, chats, study.NEW_TOKENS)
        rows.append({"condition": f"rewarded lora {sign}"} | measured(model, texts))
    return rows


def study_controls() -> Path:
    """Trained opponents of the tone vector on the report prompts, all trained at one size."""
    start, model = time.time(), load_subject()
    units: dict[str, Callable[..., Any]] = {
        kind: vector_rows for kind in ("same size", *(f"shuffled {k}" for k in SHUFFLES), "one layer")
    }
    rows = []
    key = [model.hash, study.NEW_TOKENS, report_prompts(), study.TRAINING, sizes(), fingerprint(study.selected()[0])]
    for kind, work in units.items():
        rows += resumed("steering_controls", [kind, *key], work, model, kind)
    rows += resumed("steering_controls", ["rewarded lora", *key], lora_rows, model)
    about = {"size": sizes(), "training": study.TRAINING, "prompts": report_prompts()}
    return write_table("steering_controls", model, time.time() - start, **about, rows=rows)


STUDIES_OF_DIALS = {"steering-controls": study_controls}
"""not among those that ``prepare`` repeats on another model"""
