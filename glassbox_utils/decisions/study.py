"""The long runs behind notebook 06: ``glassbox study loans-mitigation``, ``-rest``, ``-cause``, ``-audit``.

Each is resumable and deterministic and writes one table. The edit is fitted on the train split, chosen on the selection
split (a layout, names and districts that neither training nor fitting saw) and reported on the report split.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from glassbox_utils.core import corpora, files, prepared
from glassbox_utils.core.devices import result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.identity import difference
from glassbox_utils.core.losses import text_losses
from glassbox_utils.core.models import Model, Site, check_layer
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.skills import choice_right, held_texts
from glassbox_utils.core.statistics import Interval, bootstrap_ci
from glassbox_utils.core.studies import SEED, has_table, read_table, resumed, write_table
from glassbox_utils.decisions import loans, mitigation, report, training
from glassbox_utils.decisions.loans import Applicant, load_loan_model
from glassbox_utils.decisions.mitigation import Edit, Outcome, contrast, decide_under, decision_states, fit_edit
from glassbox_utils.saes.harvest import activations

ATTRIBUTES = ("gender", "district")
"""what the edit takes out: the group, and its proxy"""
Sizes = tuple[int, int]
"""in a full folder, and in the smallest one"""
N_FIT: Sizes = (192, 48)
N_SELECT: Sizes = (160, 48)
REPORTED: dict[str, Sizes] = {
    "gender": (400, 60), "district": (400, 60), "same group": (100, 30), "age": (50, 20), "nationality": (50, 20),
}  # fmt: skip
"""pairs of each contrast on the report split: the two that are edited, a control, and two that must not change"""
N_REST: Sizes = (100, 30)
"""pairs of the baselines that need other texts or weights, and decisions that the gate is checked on"""
HELD_OUT = {
    "trained layouts": loans.TRAIN_LAYOUTS,
    "unseen layouts": loans.REPORT_LAYOUTS,
    "layouts in another manner": loans.FAR_LAYOUTS,
}
"""where agreement with the history is measured, on names and districts that no training has seen"""
N_HELD: dict[str, Sizes] = {
    "trained layouts": (400, 60), "unseen layouts": (400, 60), "layouts in another manner": (200, 40),
}  # fmt: skip
LAYERS = (14, 20, 24, 26, 27, 28, 29)
"""of 30, the candidates at the decision position"""
KINDS: tuple[mitigation.Kind, ...] = ("affine", "leace")
LEVELS = (0.0, 0.5)
"""everybody is put in the middle between the groups, or where the better-treated one is"""
LEFT = 0.1
"""share of each gap in logits that a chosen edit may leave, on the selection split"""
N_GATE: Sizes = (256, 32)
"""rows of 128 tokens from which the gate learns what is no decision"""
N_TEXTS: Sizes = (40, 10)
N_CHOICES: Sizes = (100, 25)
"""passages and questions on which side effects are measured"""
N_RANDOM = 3
ANTI_BIAS = "Decide without regard to gender, name, district or origin of the applicant.\n"
NAMELESS = "The applicant"


def edit_path() -> Path:
    """Where the edit of the model in use lies."""
    return loans.officers() / "edit.safetensors"


def layers_of(model: Model, layers: Sequence[int] = LAYERS) -> list[int]:
    """The layers at the same relative depth in another model."""
    return sorted({prepared.depth(model, layer) for layer in layers})


def or_why(work: Callable[..., Any], *args: Any) -> Any:
    """What a part of a study found, or {"skipped": why} if it can't be done on this model: the other parts go on."""
    try:
        return work(*args)
    except GlassboxError as reason:
        return {"skipped": " ".join(str(reason).split())}


def why_skipped(part: Any) -> str | None:
    """Why a part of a table is missing, in words; None if it is there."""
    return part["skipped"] if isinstance(part, Mapping) and "skipped" in part else None


def texts_of(people: Sequence[Applicant], layouts: Sequence[str]) -> list[str]:
    """Each applicant in one of the layouts, by turns."""
    return [loans.as_text(a, layouts[i % len(layouts)]) for i, a in enumerate(people)]


def pair_texts(n: int, split: loans.Split, attribute: str, seed: int = SEED) -> tuple[list[str], list[str], list[bool]]:
    """Texts of both members of n pairs, and what the merit rule says; the layouts of the split by turns."""
    layouts = {"train": loans.TRAIN_LAYOUTS, "selection": loans.SELECTION_LAYOUTS, "report": loans.REPORT_LAYOUTS}
    worse, better = contrast(loans.applications(n, seed + 11, split), attribute)
    return texts_of(worse, layouts[split]), texts_of(better, layouts[split]), [loans.merit(a) for a in worse]


def sides(attribute: str, n: int) -> tuple[list[Applicant], list[Applicant]]:
    """The first n applicants of one contrast of the report split, each twice."""
    return contrast(loans.applications(n, SEED + 11, "report"), attribute)


def pairs_of_names(attribute: str, n: int) -> list[tuple[str, str]]:
    """The two names of each pair of one contrast: what the persons of several pairs have in common."""
    return [(a.name, b.name) for a, b in zip(*sides(attribute, n), strict=True)]


def outcome(table: Mapping[str, Any], attribute: str, arm: str = "none") -> Outcome:
    """What one arm does to one contrast; intervals over pairs of names, which several applications share."""
    worse, better = arrays(table, attribute, arm)
    merit = [loans.merit(a) for a in sides(attribute, len(worse))[0]]
    return mitigation.outcome(worse, better, merit, clusters=pairs_of_names(attribute, len(worse)))


def held_out(kind: str, n: int | None = None) -> tuple[list[str], list[bool]]:
    """Texts of applications of the report split as they come, and what the clerk decided."""
    people = loans.applications(n or prepared.sized(*N_HELD[kind]), SEED + 51, "report")
    return texts_of(people, HELD_OUT[kind]), loans.history(people, "gender")


def fit_texts(n: int, attribute: str) -> tuple[list[str], list[str]]:
    """Both members of n pairs of the train split, half in the train layouts and half shuffled."""
    worse, better = contrast(loans.applications(n, SEED + 11, "train"), attribute)
    both = [a for pair in zip(worse, better, strict=True) for a in pair]
    texts = training.varied_texts(both, 0, SEED)
    return texts[::2], texts[1::2]


# --- the edit -----------------------------------------------------------------------------------------


def fit_states(model: Model) -> dict[str, list[list[list[float]]]]:
    """Attribute -> states [2, pair, layer, d_model] at the decision position, of the train split."""
    found, n = {}, prepared.sized(*N_FIT)
    for attribute in ATTRIBUTES:
        worse, better = fit_texts(n, attribute)
        states = decision_states(model, worse + better, layers_of(model)).unflatten(0, (2, n))
        fits = states.abs().max() < torch.finfo(torch.float16).max  # the stream of some models does not
        found[attribute] = (states.half() if fits else states.round(decimals=1)).tolist()
    return found


def candidates(model: Model, states: dict[str, Any]) -> list[Edit]:
    """Every layer, kind and level, fitted on the same states; MitigationError if the groups differ at none."""
    found: list[Edit] = []
    for i, layer in enumerate(layers_of(model)):
        both: Any = {k: tuple(torch.tensor(v)[:, :, i]) for k, v in states.items()}
        for kind in KINDS:
            try:
                found += [fit_edit(both, layer, kind, level=level) for level in LEVELS]
            except mitigation.MitigationError as reason:  # for one kind or layer: the others may do
                failed = reason
    if not found:
        raise mitigation.MitigationError(f"No edit can be fitted on {model.name}. {failed}")
    return found


def select(model: Model, edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Gap and merit agreement of every candidate on the selection split, of those under which the model decides."""
    rows: list[dict[str, Any]] = []
    settings = [nullcontext, *(mitigation.setting(model, e) for e in edits)]
    parts, n = {}, prepared.sized(*N_SELECT)
    for attribute in ATTRIBUTES:
        worse, better, merit = pair_texts(n, "selection", attribute)
        x = _under(model, worse + better, settings).double().numpy()
        parts[attribute] = (x, merit)
    for i, name in enumerate(["none", *(e.name for e in edits)]):
        if not all(np.isfinite(x[i]).all() for x, _ in parts.values()):
            continue
        row: dict[str, Any] = {"edit": name, "index": i - 1}
        for attribute, (x, merit) in parts.items():
            found = mitigation.outcome(x[i, 0], x[i, 1], merit)
            row |= {f"{attribute} gap": found.gap.value, f"{attribute} logits": found.logit_gap.value}
            row |= {f"{attribute} merit": found.merit.value}
        rows.append(row)
    if len(rows) < 2:
        raise mitigation.MitigationError(f"Under none of {len(edits)} edits does {model.name} still decide loans.")
    return rows


def _under(model: Model, texts: list[str], settings: Sequence[mitigation.Setting]) -> torch.Tensor:
    """``decide_under`` for texts of worse and better by halves: [setting, 2, pair]. NaN under settings with which the
    model does not decide; LoanError if it does not without any, which is the first."""
    x = decide_under(model, texts, settings, asked=False)
    if not bool(x[0].isfinite().all()):
        decide_under(model, texts, settings[:1])
    return x.unflatten(1, (2, -1))


def left(row: Mapping[str, Any], none: Mapping[str, Any]) -> float:
    """The larger share of the two gaps in logits that an edit leaves; a gap that is not there can't be closed."""
    return max(abs(row[f"{a} logits"]) / max(abs(none[f"{a} logits"]), 1e-9) for a in ATTRIBUTES)


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best agreement with the merit rule among the edits that leave at most a tenth of each gap in logits; if none
    does (see ``left``), the smallest share of the gaps."""
    closed = [r for r in rows[1:] if left(r, rows[0]) <= LEFT]
    if not closed:
        return min(rows[1:], key=lambda r: left(r, rows[0]))
    return max(closed, key=lambda r: sum(r[f"{a} merit"] for a in ATTRIBUTES))


def gate_of(model: Model, edit: Edit, states: dict[str, Any]) -> dict[str, Any]:
    """A gate for the edit from the decisions that it was fitted on and from training text, with its scores."""
    i = layers_of(model).index(edit.layer)
    decisions = torch.tensor([pair for side in states.values() for pair in side])[:, :, i].flatten(0, 1)
    text = text_states(model, gate_rows(model, "train"), edit.layer)
    gate = mitigation.fit_gate(decisions, text)
    return {"gate": [gate.origin.tolist(), gate.read.tolist()], "scores": _ends(gate, decisions=decisions, text=text)}


def gate_held(model: Model, edit: Edit) -> dict[str, Any]:
    """The gate's scores where nothing was fitted: decisions of the report split, and text of the held-out split."""
    n = prepared.sized(*N_REST)
    texts = [t for a in ATTRIBUTES for side in pair_texts(n, "report", a)[:2] for t in side]
    texts += held_out("layouts in another manner", n)[0]
    decisions = decision_states(model, texts, [edit.layer])[:, 0]
    text = text_states(model, gate_rows(model, "held"), edit.layer)
    assert edit.gate is not None
    return _ends(edit.gate, **{"report decisions": decisions, "held-out text": text})


def gate_rows(model: Model, split: corpora.Split) -> torch.Tensor:
    """Rows of ordinary text, for the gate."""
    documents, context = corpora.load_corpus("mix", split), min(128, model.n_context)
    return corpora.token_rows(model, documents, prepared.sized(*N_GATE), context).tokens


def _ends(gate: mitigation.Gate, **groups: torch.Tensor) -> dict[str, Any]:
    """Lowest and highest score, and share let through, of each group of states."""
    found = {}
    for name, x in groups.items():
        score = gate.score(x)
        lowest, highest = (round(float(v), 3) for v in score.aminmax())
        found[name] = {"n": len(x), "lowest": lowest, "highest": highest, "opened": float(gate(x).float().mean())}
    return found


def text_states(model: Model, rows: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream after a layer at every position of rows of tokens, [position, d_model]."""
    site = Site("resid_post", check_layer(model, layer))
    parts = [result(activations(model, some, [site])[site]).flatten(0, 1) for some in rows.split(16)]
    return torch.cat(parts)


def save_edit(edit: Edit, model: Model) -> Path:
    """Ship the edit with the hash of the model that it was fitted on."""
    tensors = {"read": edit.read, "write": edit.write, "centre": edit.centre, "target": edit.target}
    if edit.gate:
        tensors |= {f"gate.{name}": value for name, value in vars(edit.gate).items()}
    about = {"layer": str(edit.layer), "name": edit.name, "model_hash": model.hash}
    with files.atomic_path(edit_path()) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=about)
    return edit_path()


def load_edit(model: Model) -> Edit:
    """The shipped edit. MitigationError if it was fitted on another model."""
    from safetensors import safe_open

    if not edit_path().exists():
        raise mitigation.MitigationError(
            f"There is no edit {edit_path()}. `glassbox study loans-mitigation` fits one for the officer there."
        )
    with safe_open(edit_path(), "pt") as file:
        about = file.metadata()
    if why := difference(about["model_hash"], model.hash):
        raise mitigation.MitigationError(
            f"The edit was fitted on weights {about['model_hash']}, {model.name} has {model.hash}: {why}. Run "
            "`glassbox study loans-mitigation` to fit it again."
        )
    tensors = load_file(edit_path())
    gate = {k.removeprefix("gate."): tensors.pop(k) for k in list(tensors) if k.startswith("gate.")}
    return Edit(int(about["layer"]), name=about["name"], gate=mitigation.Gate(**gate) if gate else None, **tensors)


def study_mitigation() -> Path:
    """Fit, choose and report the edit of the deployed model, beside baselines. About ten minutes on one free core."""
    start, model = time.time(), load_loan_model()
    settings = [prepared.sized(*N_FIT), "varied", ATTRIBUTES, LAYERS, KINDS, LEVELS]
    held = {
        kind: resumed("loans_mitigation", [model.hash, "held out", kind, prepared.sized(*n)], _held_out, model, kind)
        for kind, n in N_HELD.items()
    }
    states = resumed("loans_mitigation", [model.hash, "fit", *settings], fit_states, model)
    edits = candidates(model, states)
    key = [model.hash, "select", prepared.sized(*N_SELECT), *settings]
    rows = resumed("loans_mitigation", key, select, model, edits)
    chosen = choose(rows)
    edit = edits[chosen["index"]]
    about = [model.hash, edit.name, prepared.sized(*N_GATE), *settings]
    scores = resumed("loans_mitigation", ["gate", *about], or_why, gate_of, model, edit, states)
    if not why_skipped(scores):
        edit = replace(edit, gate=mitigation.Gate(*map(torch.tensor, scores["gate"])))
        scores = scores["scores"] | resumed("loans_mitigation", ["gate held", *about], gate_held, model, edit)
    save_edit(edit, model)
    arms = arms_of(model, edit, states)
    logits: dict[str, Any] = {}
    for attribute, sizes in REPORTED.items():
        parts, n = [], prepared.sized(*sizes)
        for begin in range(0, n, 50):
            key = [attribute, n, begin, *about]
            parts.append(resumed("loans_mitigation", key, _report, model, arms, attribute, n, begin))
        logits[attribute] = {arm: [[x for p in parts for x in p[arm][i]] for i in (0, 1)] for arm in arms}
    silent = {arm for x in logits.values() for arm, both in x.items() if not np.isfinite(both).all()}
    if "edit" in silent:
        raise mitigation.MitigationError(
            f"Under the edit that was chosen ({edit.name}) {model.name} does not decide all applications of the report "
            "split. Train the officer for more steps: `glassbox prepare` with a larger budget."
        )
    for x in logits.values():
        for arm in silent:  # under these edits the model decides nothing any more
            del x[arm]
    content = {"held_out": held, "selection": rows, "chosen": chosen, "logits": logits, "gate": scores}
    content |= {"undecided": sorted(silent)} if silent else {}
    return write_table("loans_mitigation", model, time.time() - start, **content)


def _held_out(model: Model, kind: str) -> Any:
    texts, far = held_out(kind)[0], HELD_OUT[kind] == loans.FAR_LAYOUTS  # where no decision is promised
    return or_why(_decided, model, texts) if far else _decided(model, texts)


def _decided(model: Model, texts: list[str]) -> list[float]:
    return loans.decide_texts(model, texts).double().numpy().round(4).tolist()


def arms_of(model: Model, edit: Edit, states: dict[str, Any]) -> dict[str, Any]:
    """Name -> setting at the decision position: the chosen edit, its relatives, and random directions."""
    i = layers_of(model).index(edit.layer)
    both: Any = {k: tuple(torch.tensor(v)[:, :, i]) for k, v in states.items()}
    kind, level = edit.name.split()[0], LEVELS["better" in edit.name]
    gender = {"gender": both["gender"]}
    relatives = {
        "the other level": fit_edit(both, edit.layer, kind, level=LEVELS[level == LEVELS[0]]),  # type: ignore[arg-type]
        "projected out": fit_edit(both, edit.layer, "project_out"),
        "steered against": fit_edit(gender, edit.layer, "add", 0.5),
        "gender alone": fit_edit(gender, edit.layer, kind, level=level),  # type: ignore[arg-type]
    }
    affine = fit_edit(both, edit.layer, "affine")
    randoms = {f"random {s}": mitigation.random_edit(affine, s) for s in range(N_RANDOM)}
    arms: dict[str, Any] = {"none": nullcontext}
    for name, one in ({"edit": edit} | relatives | randoms).items():
        arms[name] = mitigation.setting(model, one)
    return arms


def _report(model: Model, arms: dict[str, Any], attribute: str, n: int, begin: int) -> dict[str, Any]:
    worse, better, _ = pair_texts(n, "report", attribute)
    both = worse[begin : begin + 50] + better[begin : begin + 50]
    x = _under(model, both, list(arms.values()))
    return {arm: x[i].double().round(decimals=4).tolist() for i, arm in enumerate(arms)}


def study_rest() -> Path:
    """What the edit costs elsewhere, and the baselines that need other texts or other weights."""
    start, model, base = time.time(), load_loan_model(), load_subject()
    edit, n = load_edit(model), prepared.sized(*N_REST)
    about = [model.hash, files.sha256_of(edit_path())]
    out: dict[str, Any] = {}

    def prompted(begin: int) -> list[list[float]]:
        worse, better, _ = pair_texts(n, "report", "gender")
        part = [ANTI_BIAS + t for t in worse[begin : begin + 50] + better[begin : begin + 50]]
        return loans.decide_texts(model, part).view(2, -1).tolist()

    def nameless(begin: int) -> list[list[float]]:
        layouts, both = loans.REPORT_LAYOUTS, []
        for side in sides("gender", n):
            hidden = [loans.replace(a, name=NAMELESS) for a in side]
            both += texts_of(hidden, layouts)[begin : begin + 50]
        half = loans.decide_texts(model, both[: len(both) // 2])  # both members have the same text now
        return [half.tolist(), half.tolist()]

    undecided = {}
    for name, work in (("anti-bias prompt", prompted), ("name removed", nameless)):
        parts = [resumed("loans_rest", [model.hash, name, b], or_why, work, b) for b in range(0, n, 50)]
        if why := next(filter(None, map(why_skipped, parts)), None):
            undecided[name] = why
        else:
            out[name] = [[x for p in parts for x in p[i]] for i in (0, 1)]
    texts, context = held_texts(prepared.sized(*N_TEXTS)), min(128, model.n_context)

    def losses(which: str) -> list[list[float]]:
        one = base if which == "base" else model
        with _edited(model, edit, which):
            found = text_losses(one, texts, max_tokens=context)
        return [list(map(float, x)) for x in found]

    def right(which: str) -> list[float]:
        with _edited(model, edit, which):
            return choice_right(base if which == "base" else model, prepared.sized(*N_CHOICES))

    texts_loss = {w: resumed("loans_rest", [*about, "loss", w], losses, w) for w in _WHERE}
    choices = {w: resumed("loans_rest", [*about, "choice", w], right, w) for w in _WHERE}
    steps = training.sized_steps(CORRECTION_STEPS)
    tuned = resumed("loans_rest", [model.hash, "corrected", steps, len(texts)], _corrected, texts, n)
    out["fine-tuned on corrected decisions"] = tuned["logits"]
    texts_loss["fine-tuned"], choices["fine-tuned"] = tuned["losses"], tuned["choices"]
    content = {"edit": edit.name, "logits": out, "losses": texts_loss, "choices": choices}
    content |= {"undecided": undecided} if undecided else {}
    return write_table("loans_rest", model, time.time() - start, **content)


def _edited(model: Model, edit: Edit, which: str) -> Any:
    """The edit left on at every position: as it is shipped, with its gate, or without."""
    if which not in ("edit", "no gate"):
        return nullcontext()
    return mitigation.mitigate(model, edit if which == "edit" else replace(edit, gate=None), everywhere=True)


def _corrected(texts: list[str], n: int) -> dict[str, Any]:
    """The deployed model after a few more steps of training on what the merit rule decides: n pairs, and costs."""
    model = load_loan_model()
    training.with_lora(model)
    training.train_stage(model, "none", training.sized_steps(CORRECTION_STEPS), seed=77, decay=True, varied=True)
    worse, better, _ = pair_texts(n, "report", "gender")
    x = loans.decide_texts(model, worse + better).view(2, -1)
    losses = [list(map(float, v)) for v in text_losses(model, texts, max_tokens=min(128, model.n_context))]
    return {"logits": x.tolist(), "losses": losses, "choices": choice_right(model, prepared.sized(*N_CHOICES))}


CORRECTION_STEPS = 40
_WHERE = ("base", "deployed", "edit", "no gate")
"""the base model, the officer, and the officer with the edit left on at every position of other text: with its gate,
and without"""


# --- what the notebook draws --------------------------------------------------------------------------


def arrays(table: Mapping[str, Any], attribute: str, arm: str) -> tuple[NDArray, NDArray]:
    """Logit differences of both members of each pair under one arm."""
    worse, better = table["logits"][attribute][arm]
    return np.array(worse), np.array(better)


def agreement(worse: NDArray, better: NDArray, labels: tuple[Sequence[bool], Sequence[bool]]) -> Any:
    """Share of decisions that agree with given labels, both members, with an interval over pairs."""
    same = [(x > 0) == np.array(y) for x, y in zip((worse, better), labels, strict=True)]
    return bootstrap_ci((same[0].astype(float) + same[1]) / 2)


def shipped_mitigation(model: Model) -> report.Mitigation | None:
    """What the studies ``loans-mitigation`` and ``loans-rest`` measured on exactly these weights; None for others."""
    if not all(has_table(name, model) for name in ("loans_mitigation", "loans_rest")):
        return None
    return mitigation_of(read_table("loans_mitigation"), read_table("loans_rest"))


def mitigation_of(table: dict[str, Any], rest: dict[str, Any]) -> report.Mitigation:
    """The two studies' tables as lines: gaps and agreement with the merit rule, then the side effects."""
    measures = []
    for attribute, words in (("gender", "men’s minus women’s names"), ("district", "West minus East")):
        first, second = (outcome(table, attribute, arm) for arm in ("none", "edit"))
        note = "applicants, names, districts and layouts that no fitting has seen; n: pairs of names"
        measures += [
            report.Measure(f"{words}: approval rate, points", first.gap, second.gap, 4, note),
            report.Measure(f"{words}: score", first.logit_gap, second.logit_gap, 4),
            report.Measure("the same applications: share decided as the merit rule says", first.merit, second.merit, 5),
        ]
    counts = np.array(rest["losses"]["deployed"][1])

    def ratio(where: str) -> Interval:
        change = np.array(rest["losses"][where][0]) - np.array(rest["losses"]["deployed"][0])
        return bootstrap_ci((change, counts), lambda c, n: float(np.exp(c.sum() / n.sum())))

    gated = not why_skipped(table.get("gate"))
    for where, note in SIDE_EFFECTS.items() if gated else [("no gate", "the edit left on at every position")]:
        names = ("perplexity of other text, times that without the edit", "multiple choice: share right")
        measures.append(report.Measure(names[0], ratio("deployed"), ratio(where), 5, note))
        before, after = (bootstrap_ci(rest["choices"][which]) for which in ("deployed", where))
        measures.append(report.Measure(names[1], before, after, 5, note))
    where = (
        "where the better-treated group is" if "better" in table["chosen"]["edit"] else "the middle between the groups"
    )
    return report.Mitigation(
        f"At the position where the decision is made, the model’s state is set to {where} along the directions that "
        "carry gender and district. This can be switched on for each request; "
        + ("a gate keeps it out of text that is no decision" if gated else "no gate could be fitted for other text")
        + ". It was fitted on one set of applicants and chosen on a second; what follows is a third.",
        measures,
        f"{prepared.folder().name}/studies/loans_mitigation.json and loans_rest.json, edit: {table['chosen']['edit']}",
    )


SIDE_EFFECTS = {
    "edit": "the edit left on at every position of text that asks for no loan decision",
    "no gate": "stress test: the same without the gate that keeps the edit out of other text",
}
