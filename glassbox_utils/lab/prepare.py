"""``glassbox prepare MODEL``: all that the notebooks read, made for another model, in one folder that can be resumed.

A plan comes first: the steps, the share of the full number of cases that the budget of minutes allows, the memory and
the disk. Times are those of ``data/prepare.json`` (each step at one or more sizes, on the embedded model), scaled by
how fast this model reads and writes on this machine, and corrected after every step by what the steps so far have
taken. A step that can't be done on a model is recorded in ``refused.json`` with its reason, and the others go on.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from glassbox_utils.core import assets, corpora, files, own_text, own_writing, packaged, prepared, schema
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model, load_model
from glassbox_utils.core.prepared import Card, PreparedError
from glassbox_utils.core.session import timed
from glassbox_utils.core.text import generate, tokenize
from glassbox_utils.decisions import training
from glassbox_utils.lab.subjects import REFUSED
from glassbox_utils.saes import detection, recipes
from glassbox_utils.saes.training import train_from_config

LOG = "prepare.json"
SMALLEST = 0.02
"""share of the full sizes below which nothing would be worth keeping"""
TOKENS = {"main": 1_638_400, "late": 720_896}
"""harvested at full size, as for the embedded model"""
LEAST_TOKENS = 65_536
FIXED = 20.0
"""seconds that a step takes whatever its size: loading the model, the words of the plan"""
BELIEF = 120.0
"""seconds for which the plan is believed against what the first steps took"""
WRITING = ("corpus", "clamp-", "steering-")
"""steps whose time is that of writing; all others mostly read"""
SAMPLED = 4_000
"""documents that the model writes at full size where it writes its own corpus"""

Studies = Mapping[str, Callable[[], Path]]


@dataclass(frozen=True)
class Speed:
    """Seconds that a model takes on this machine for one fixed piece of reading and one of writing."""

    reading: float
    """1,024 tokens through the layers, 16 rows of 64"""
    writing: float
    """16 tokens each for 16 rows"""


@dataclass(frozen=True)
class Step:
    """One step of the preparation."""

    name: str
    points: Sequence[tuple[float, float]]
    """(size, seconds) as measured, on this machine, sizes ascending"""
    run: Callable[[], Any]

    def seconds(self, size: float) -> float:
        """Expected at a size: on the line through the two nearest points."""
        (a, low), (b, high) = next(
            (pair for pair in itertools.pairwise(self.points) if size <= pair[1][0]), self.points[-2:]
        )
        return max(low, low + (high - low) * (size - a) / (b - a))


@dataclass(frozen=True)
class Plan:
    """What will be made, how large, and what it takes."""

    steps: Sequence[Step]
    size: float
    seconds: float
    memory: float
    """GiB"""
    disk: float
    """GiB"""


def prepare(
    model: str | Path,
    studies: Studies,
    minutes: float | None = None,
    out: Path | None = None,
    corpus: str | Path | Sequence[str | Path] = "mix",
) -> Path:
    """Make the prepared folder of a model, or go on where an earlier call was stopped; returns the folder.

    ``minutes``: the budget; None is everything at full size. ``corpus``: what the SAEs learn from: a registered corpus,
    a data set on the hub, text files or folders of them, or ``sampled``: text that the model writes. Raises
    PreparedError for a folder that belongs to other weights or was begun with other settings, and for a budget that is
    too small; ModelError for the model.
    """
    texts = _checked(corpus)
    if minutes is not None and not 0 < minutes < 1e6:
        raise PreparedError(f"The budget is {minutes!r} minutes. Allowed: a number above 0, or none for full size.")
    source = str(Path(model).absolute()) if Path(model).exists() else str(model)
    subject = load_model(source)
    folder = files.check_output(out or prepared.models_dir() / subject.name, "--out", folder=True).absolute()
    log = _begun(folder, {"model_hash": subject.hash, "minutes": minutes, "corpus": texts})
    with prepared.using(folder):
        plan = _plan(subject, source, folder, studies, log)
        _say(plan, subject, folder, log)
        _establish(folder, log | {"size": plan.size}, source)
        del subject
        _run(plan, folder)
    return folder


def _checked(corpus: str | Path | Sequence[str | Path]) -> list[str]:
    """Names of corpora, or whole paths of text, that are there; CorpusError or OwnTextError."""
    names = [corpus] if isinstance(corpus, str | Path) else list(corpus)
    if names != ["sampled"] and (len(names) > 1 or Path(names[0]).exists()):
        own_text.files_of(names)
        return [str(Path(name).absolute()) for name in names]
    if names != ["sampled"]:
        corpora.check_corpus(str(names[0]))
    return [str(name) for name in names]


def _begun(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The log of an earlier call with the same settings, or a new one (not written yet)."""
    if folder.resolve() == assets.DATA.resolve():
        raise PreparedError(f"{folder} ships with the repository. Give another folder with --out.")
    if (folder / LOG).exists():
        log = _log(folder)
        for name, value in wanted.items():
            if log[name] != value:
                raise PreparedError(
                    f"{folder} was begun with {name} {log[name]!r}, and {value!r} is asked for now. Give what it was "
                    "begun with, or another folder with --out."
                )
        return log
    if folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise PreparedError(f"{folder} is not empty and no prepared folder. Give another one with --out.")
    return wanted | {"size": None, "spent": 0.0, "steps": {}}


def _establish(folder: Path, log: dict[str, Any], source: str) -> None:
    """Log (first: it says whose folder this is), card and officers' key, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, log)
    if not (folder / prepared.CARD).exists():
        known = packaged.MODELS.get(source)
        licence = known.licence if known else prepared.licence_of(log["model_hash"])  # as another folder of it says
        card = Card(source, log["model_hash"], licence, size=log["size"], minutes=log["minutes"])
        prepared.write_card(card, folder)
    training.prepare_key()


def _log(folder: Path) -> dict[str, Any]:
    values = schema.read_mapping(folder / LOG, PreparedError, "the file that `glassbox prepare` wrote")
    if missing := {"model_hash", "minutes", "corpus", "size", "spent", "steps"} - values.keys():
        raise PreparedError(f"{folder / LOG} is damaged: {min(missing)} is missing. Delete the folder and begin again.")
    return values


def _write(folder: Path, log: dict[str, Any]) -> dict[str, Any]:
    with files.atomic_path(folder / LOG) as partial:
        partial.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return log


# --- the plan -----------------------------------------------------------------------------------------


def speed_of(model: Model) -> Speed:
    """Measure reading and writing, best of two."""
    text = "The committee met on Tuesday, and after a long discussion it decided to wait. " * 6
    batch = tokenize(model, [text] * 16)
    rows = batch.input_ids[:, : min(64, model.n_context)]

    def read() -> None:
        with torch.no_grad():
            model.hf(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False, logits_to_keep=1)

    write = lambda: generate(model, ["The committee decided"] * 16, 16)  # noqa: E731
    return Speed(timed(read, 2), timed(write, 2))


def reference() -> dict[str, Any]:
    """Runs on the embedded model: its speed on that machine, and of each step a list of ``{size, seconds}``."""
    return json.loads((assets.DATA / LOG).read_text(encoding="utf-8"))


def _plan(model: Model, source: str, folder: Path, studies: Studies, log: Mapping[str, Any]) -> Plan:
    known, mine = reference(), speed_of(model)
    slower = {True: mine.writing / known["writing"], False: mine.reading / known["reading"]}
    points = {name: _points(rows, slower[name.startswith(WRITING)]) for name, rows in known["steps"].items()}
    typical = ((0.0, FIXED), (1.0, sum(p[-1][1] / p[-1][0] for p in points.values()) / max(1, len(points))))
    runs = dict(_runs(model, source, folder, studies, log["corpus"]))
    steps = [Step(name, points.get(name, typical), run) for name, run in runs.items()]
    size = log["size"] or _first_size(steps, log["minutes"])
    seconds = sum(s.seconds(size) for s in steps if s.name not in log["steps"])
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters()) / 2**30
    harvested = max(_tokens(role, size) for role in prepared.ROLES) * model.d_model * 2 / 2**30
    sae = 2 * _width(size) * model.d_model * 4 / 2**30
    memory = 1.5 + 2.2 * weights + 4 * sae  # two copies of a layer or so; weights, gradients and Adam's two means
    disk = 2 * harvested + 2 * sae + 0.1
    return Plan(steps, size, seconds, memory, disk)


def _points(rows: Sequence[Mapping[str, float]], slower: float) -> Sequence[tuple[float, float]]:
    """(size, seconds) on this machine, at least two: at size 0 stands what a step takes whatever its size."""
    measured = sorted((row["size"], row["seconds"] * slower) for row in rows)
    return measured if len(measured) > 1 else [(0.0, min(FIXED, measured[0][1])), *measured]


def _fitting(steps: Sequence[Step], seconds: float) -> float:
    """The largest size at which the steps together take no longer; below ``SMALLEST`` if there is none."""
    low, high = 0.0, 1.0
    if sum(s.seconds(high) for s in steps) <= seconds:
        return high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if sum(s.seconds(middle) for s in steps) <= seconds else (low, middle)
    return low


def _first_size(steps: Sequence[Step], minutes: float | None) -> float:
    """The share of the full sizes that fits into the budget."""
    if minutes is None:
        return 1.0
    size = _fitting(steps, minutes * 60)
    if size < SMALLEST:
        least = sum(s.seconds(SMALLEST) for s in steps) / 60
        raise PreparedError(
            f"The budget is {minutes:g} minutes. With this model on this machine even {SMALLEST:.0%} of the full sizes "
            f"takes about {least:.0f}. Give a larger budget, or a faster --device."
        )
    return round(size, 3)


def _tokens(role: str, size: float) -> int:
    return min(TOKENS[role], max(LEAST_TOKENS, round(TOKENS[role] * size)))


def _width(size: float) -> int:
    """Features of an SAE: as many as so few tokens can fill."""
    return 8192 if size > 0.5 else 4096 if size > 0.1 else 2048


def _runs(
    model: Model, source: str, folder: Path, studies: Studies, corpus: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every step in its order, by name."""
    if list(corpus) == ["sampled"]:
        yield "corpus", lambda: _sample(folder)
    elif len(corpus) > 1:
        yield "corpus", lambda: _gather(folder, corpus)
    for role in prepared.ROLES:
        if role == "main" or recipes.layer_of(model, role) != recipes.layer_of(model, "main"):
            yield f"sae-{role}", lambda role=role: _sae(role, source, folder, corpus)  # type: ignore[misc]
    for officer in training.recipes():
        yield f"officer-{officer}", lambda officer=officer: training.train_named(officer)  # type: ignore[misc]
    yield from studies.items()


def _say(plan: Plan, model: Model, folder: Path, log: Mapping[str, Any]) -> None:
    done = len([s for s in plan.steps if s.name in log["steps"]])
    print(f"{model}: {len(plan.steps)} steps into {folder}" + (f", {done} of them done before" if done else ""))
    for step in plan.steps:
        if step.name not in log["steps"]:
            print(f"  {step.name:20} about {step.seconds(plan.size) / 60:5.1f} min")
    print(
        f"at {plan.size:.0%} of the full sizes: about {plan.seconds / 60:.0f} minutes, {plan.memory:.1f} GiB of "
        f"memory, {plan.disk:.1f} GiB of disk. It can be stopped at any time; the same command goes on.",
        flush=True,
    )


# --- the steps ----------------------------------------------------------------------------------------


def _run(plan: Plan, folder: Path) -> None:
    unforeseen = []
    for i, step in enumerate(plan.steps):
        log = _log(folder)
        if step.name in log["steps"]:
            continue
        size = log.get("now", {}).get(step.name) or _next_size(plan, i, log)
        _write(folder, log | {"now": {step.name: size}})  # the same after a kill, so that finished parts count
        begin, reason = time.perf_counter(), ""
        try:
            with prepared.at_size(size):
                step.run()
        except GlassboxError as error:
            reason = str(error)
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            reason = f"This was not foreseen: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            unforeseen.append(step.name)
        seconds = time.perf_counter() - begin
        _refuse(folder, step.name, reason)
        log = _log(folder)
        row = {"size": size, "seconds": round(seconds, 1)} | ({"refused": True} if reason else {})
        _write(folder, {**log, "now": {}, "spent": log["spent"] + seconds, "steps": {**log["steps"], step.name: row}})
        print(f"{step.name}: {seconds / 60:.1f} min" + (f"; can't be done: {reason}" if reason else ""), flush=True)
    if unforeseen:
        raise PreparedError(
            f"All else is done, but {', '.join(unforeseen)} ended with an error that was not foreseen: see "
            f"{folder / REFUSED}. To try it again, delete its entry in {LOG}."
        )


def _next_size(plan: Plan, i: int, log: Mapping[str, Any]) -> float:
    """Of the next step: what is left of the budget, for all steps that are left, as slow as those so far were."""
    if log["minutes"] is None:
        return 1.0
    done = [(s, log["steps"][s.name]) for s in plan.steps if s.name in log["steps"]]
    done = [(s, row) for s, row in done if "refused" not in row]
    expected = BELIEF + sum(s.seconds(row["size"]) for s, row in done)
    ratio = (BELIEF + sum(row["seconds"] for _, row in done)) / expected
    size = _fitting(plan.steps[i:], (log["minutes"] * 60 - log["spent"]) / ratio)
    return round(min(2 * plan.size, max(SMALLEST, plan.size / 4, size)), 4)


def _refuse(folder: Path, name: str, reason: str) -> None:
    """Keep the reason, if there is one; files of the folder by their place in it, since the folder may be moved."""
    path, reason = folder / REFUSED, reason.replace(f"{folder}{os.sep}", "")
    refused = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    refused = {k: v for k, v in refused.items() if k != name} | ({name: reason} if reason else {})
    with files.atomic_path(path) as partial:
        partial.write_text(json.dumps(refused, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sample(folder: Path) -> None:
    own_writing.sample(prepared.load_subject(), folder / "corpus.jsonl", prepared.sized(SAMPLED, 200))


def _gather(folder: Path, corpus: Sequence[str]) -> None:
    """Several files or folders as one corpus."""
    lines = [
        json.dumps({"text": text}, ensure_ascii=False)
        for path in own_text.files_of(corpus)
        for text in own_text.passages(path)
    ]
    with files.atomic_path(folder / "corpus.jsonl") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sae(role: str, source: str, folder: Path, corpus: Sequence[str]) -> None:
    """Harvest, train, evaluate; the role goes into the card when all is done."""
    model, size = prepared.load_subject(), prepared.size()
    text = str(folder / "corpus.jsonl") if (folder / "corpus.jsonl").exists() else corpus[0]
    config = recipes.recipe(model, role, _tokens(role, size), _width(size), source=source, corpus=text)
    target = folder / "saes" / config.name
    target.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(target / "config.yaml") as partial:
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
        partial.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    train_from_config(target)
    if config.corpus == "mix":
        detection.add_golden_gate(model, target)
    mine = prepared.card()
    prepared.write_card(replace(mine, saes={**mine.saes, role: config.name}), folder)
