"""How good is an SAE? Reconstruction, sparsity, cross-entropy recovered, beside baselines that must lose."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from glassbox_utils.attention.attribution import resume
from glassbox_utils.core import assets, blends, coding, corpora, files, prepared, schema
from glassbox_utils.core.arguments import shown, whole
from glassbox_utils.core.devices import beside, exact, like, result
from glassbox_utils.core.interventions import edit
from glassbox_utils.core.models import Model, Site, check_site, load_model
from glassbox_utils.core.statistics import exact_ci
from glassbox_utils.core.tables import shown as shown_ci
from glassbox_utils.saes import reading
from glassbox_utils.saes.config import SaeError, TrainConfig, hook_of, read_config, site_of, width_of
from glassbox_utils.saes.harvest import (
    OUTLIER,
    activations,
    first_shard,
    measure_scaling,
    ordinary,
    stream_activations,
)
from glassbox_utils.saes.store import excluded, folder_of, load_sae, read_checkpoint


@dataclass(frozen=True)
class SaeReport:
    """Quality of an SAE (or of a baseline) on held-out text. Cross-entropies are in nats per token."""

    l0: float
    explained_variance: float
    """first token and outliers left out"""
    explained_variance_all: float
    """every position; a few positions of huge norm dominate it"""
    relative_norm: float
    """norm of the reconstruction over the norm of the activation, both about the mean: below 1 is shrinkage"""
    dead: float
    """fraction of features that never fired on n_tokens"""
    density: Float[Tensor, " d_sae"]
    """fraction of tokens on which each feature fires"""
    n_tokens: int
    ce: float
    ce_spliced: float
    ce_mean: float
    ce_zero: float
    kl: float
    """from the unchanged model's next-token distribution to the spliced one's"""
    ce_spliced_all: float
    """first token and outliers replaced too"""
    n_ce_tokens: int

    @property
    def recovered_mean(self) -> float:
        """Share of the loss by mean ablation that splicing avoids: 1 is perfect, 0 no better than the mean."""
        return (self.ce_mean - self.ce_spliced) / (self.ce_mean - self.ce)

    @property
    def recovered_zero(self) -> float:
        """The same against zero ablation, which is far off any activation and therefore flatters."""
        return (self.ce_zero - self.ce_spliced) / (self.ce_zero - self.ce)

    @property
    def recovered_all(self) -> float:
        """``recovered_mean`` with first tokens and outliers replaced by their reconstruction too; the mean that it is
        compared with stands at ordinary positions only, as there."""
        return (self.ce_mean - self.ce_spliced_all) / (self.ce_mean - self.ce)

    @property
    def numbers(self) -> dict[str, float]:
        """All scalar metrics, for cards and tables."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "density"}
        shares = ("recovered_mean", "recovered_zero", "recovered_all")
        return plain | {name: getattr(self, name) for name in shares}


@torch.inference_mode()
def evaluate_sae(
    model: Model,
    sae: Any,
    tokens: Int[Tensor, "row pos"],
    site: Site,
    median_norm: float,
    mean: Float[Tensor, " d_model"],
    ce_rows: int = 16,
) -> SaeReport:
    """Evaluate anything with ``encode`` and ``decode`` on packed held-out rows.

    Reconstruction is measured on all rows; cross-entropy on the first ``ce_rows``, with the reconstruction, the
    mean or zero put in place of the activation at every ordinary position (see the module's exclusions) and the
    other positions left as they are. ``mean`` is the mean of training activations. SaeError for another place than
    the SAE's own, and for rows, a norm or a mean that do not fit.
    """
    _check_measure(model, sae, tokens, site, median_norm, mean)
    whole("ce_rows", ce_rows, 1, SaeError)
    kept, l0, fired = 0, 0.0, torch.zeros(1)
    residual, total = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    norms = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(tokens), 8):
        x = activations(model, tokens[start : start + 8], [site])[site].float()
        usual, average = ordinary(x, median_norm), coding.seen(sae, beside(mean, x))
        features = coding.encode(sae, x)
        out, x = coding.decode(sae, features), coding.seen(sae, x)
        wrong, spread = exact((out - x).square().sum(-1)), exact((x - average).square().sum(-1))
        here = result(usual)
        residual += torch.stack([wrong[here].sum(), wrong.sum()])
        total += torch.stack([spread[here].sum(), spread.sum()])
        norms += exact(torch.stack([(y - average)[usual].norm(dim=-1).sum() for y in (out, x)]))
        active = (features != 0)[usual]
        kept, l0, fired = kept + int(here.sum()), l0 + float(active.sum()), fired + result(active.sum(0))
    splices = _splices(model, sae, tokens[:ce_rows], site, median_norm, mean)
    ev = 1 - residual / total
    return SaeReport(
        l0=l0 / kept,
        explained_variance=float(ev[0]),
        explained_variance_all=float(ev[1]),
        relative_norm=float(norms[0] / norms[1]),
        dead=float((fired == 0).float().mean()),
        density=fired / kept,
        n_tokens=kept,
        n_ce_tokens=min(ce_rows, len(tokens)) * (tokens.shape[1] - 1),
        **splices,
    )


def _check_measure(model: Model, sae: Any, tokens: Tensor, site: Site, median_norm: float, mean: Tensor) -> None:
    if hasattr(sae, "cfg") and (own := reading.check_fits(model, sae)) != check_site(model, site):
        raise SaeError(f"This SAE reads {hook_of(own)}, it was to be measured at {hook_of(site)}. Give its own site.")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise SaeError(f"tokens is {shown(tokens)}. Allowed: packed rows [row, pos] of at least 2 tokens.")
    if isinstance(median_norm, bool) or not isinstance(median_norm, Real) or not 0 < median_norm < math.inf:
        raise SaeError(f"median_norm is {shown(median_norm)}. Allowed: a number above 0 (measure_scaling).")
    if not isinstance(mean, Tensor) or mean.shape != (width_of(model, site),) or not mean.isfinite().all():
        shape = tuple(mean.shape) if isinstance(mean, Tensor) else shown(mean)
        raise SaeError(f"mean is {shape}. Allowed: {width_of(model, site)} finite numbers, the mean of activations.")


def _splices(model: Model, sae: Any, tokens: Tensor, site: Site, median_norm: float, mean: Tensor) -> dict[str, float]:
    """Mean cross-entropy with different things in the activation's place, and the KL divergence of the SAE's."""

    def replaced(function: Callable[[Tensor], Tensor], everywhere: bool = False) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            where = torch.ones_like(x[..., 0], dtype=torch.bool) if everywhere else ordinary(x, median_norm)
            return torch.where(where[..., None], like(function(x), x), x)

        return change

    def rebuilt(x: Tensor) -> Tensor:
        return coding.decode(sae, coding.encode(sae, x.float()))

    edits: dict[str, Callable[[Tensor], Tensor]] = {
        "ce": lambda x: x,
        "ce_spliced": replaced(rebuilt),
        "ce_mean": replaced(lambda x: like(mean, x).expand_as(x)),
        "ce_zero": replaced(torch.zeros_like),
        "ce_spliced_all": replaced(rebuilt, everywhere=True),
    }
    sums, kl = dict.fromkeys(edits, 0.0), 0.0
    # After a whole layer the pass can be taken up again there, which saves running the layers before it each time.
    again = site.kind == "resid_post" and site.layer + 1 < model.n_layers
    for start in range(0, len(tokens), 4):
        rows = beside(tokens[start : start + 4], model.device).long()
        x = activations(model, rows, [site])[site] if again else torch.zeros(1)
        clean = torch.zeros(1)
        for name, change in edits.items():
            with resume(model, site.layer + 1, change(x)) if again else edit(model, site, change):
                logp = model.hf(input_ids=rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            sums[name] -= float(logp.gather(-1, rows[:, 1:, None]).sum())
            if name == "ce":
                clean = logp
            elif name == "ce_spliced":
                kl += float((clean.exp() * (clean - logp)).sum())
    n = tokens[:, 1:].numel()
    return {name: value / n for name, value in sums.items()} | {"kl": kl / n}


class Linear(NamedTuple):
    """A baseline with the interface of an SAE: a linear code about a mean."""

    directions: Float[Tensor, "k d_model"]
    mean: Float[Tensor, " d_model"]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        return (x - self.mean) @ self.directions.t()

    def decode(self, code: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d_model"]:
        return code @ self.directions + self.mean


class RandomTopK(NamedTuple):
    """A baseline: k of d_sae random unit directions, chosen and weighted by projection, times one fitted gain."""

    directions: Float[Tensor, "d_sae d_model"]
    mean: Float[Tensor, " d_model"]
    k: int
    gain: float

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        code = ((x - self.mean) @ self.directions.t()).relu()
        top = code.topk(self.k, dim=-1)
        return torch.zeros_like(code).scatter_(-1, top.indices, self.gain * top.values)

    def decode(self, code: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        return code @ self.directions + self.mean


def baselines(x: Float[Tensor, "sample d_model"], k: int, d_sae: int, seed: int = 0) -> dict[str, Any]:
    """What an SAE must beat, fitted on training activations: PCA of k components, k of d_sae random directions.

    SaeError for no activations, or a k that d_model or d_sae does not hold.
    """
    if not isinstance(x, Tensor) or x.ndim != 2 or not len(x) or not x.isfinite().all():
        raise SaeError(f"x is {shown(x)}. Allowed: finite activations [sample, d_model] of at least one sample.")
    if whole("k", k, 1, SaeError) > whole("d_sae", d_sae, 1, SaeError):
        raise SaeError(f"k is {k}. Allowed: 1 to {d_sae} (d_sae).")
    mean = x.mean(0)
    centred = x - mean
    _, vectors = torch.linalg.eigh(centred.t() @ centred)
    directions = F.normalize(torch.randn(d_sae, x.shape[1], generator=torch.Generator().manual_seed(seed)), dim=-1)
    plain = RandomTopK(directions, mean, k, 1.0)
    out = plain.decode(plain.encode(x[:4096])) - mean
    gain = float((out * centred[:4096]).sum() / out.square().sum())
    return {"pca": Linear(vectors[:, -k:].t(), mean), "random": plain._replace(gain=gain)}


HELD_ROWS = 64
"""on which every shipped SAE is evaluated; one of ``prepare`` with its share of them, but 16"""


def held_out(model: Model, config: TrainConfig, n_rows: int = HELD_ROWS) -> Int[Tensor, "row pos"]:
    """Rows of text that no SAE was trained on; of a blend the part that no model wrote, like for like with others."""
    documents = corpora.load_corpus(blends.real_part(config.corpus), "held")
    return corpora.token_rows(model, documents, n_rows, config.context).tokens


def _reports(
    model: Model, sae: Any, config: TrainConfig, x: Float[Tensor, "row pos d_model"]
) -> tuple[dict[str, SaeReport], dict[str, Any]]:
    """An SAE and its baselines on held-out text, and the scaling used; ``x``: activations of training text."""
    scaling, site = measure_scaling(x), site_of(config.hook)
    tokens = held_out(model, config, prepared.sized(HELD_ROWS, 16))
    sample = x[ordinary(x, scaling.median_norm)].float()
    measure: dict[str, Any] = {"median_norm": scaling.median_norm, "mean": scaling.mean}
    reports = {"sae": evaluate_sae(model, sae, tokens, site, ce_rows=prepared.sized(16, 4), **measure)}
    for name, other in baselines(sample, round(reports["sae"].l0), config.d_sae).items():
        reports[name] = evaluate_sae(model, other, tokens, site, ce_rows=4, **measure)
    return reports, measure


def training_rows(model: Model, config: TrainConfig, rows: int) -> Float[Tensor, "row pos d_model"]:
    """Activations of the first rows of training text, of the kind that ``held_out`` measures on.

    Of a blend that is its real part: a baseline that is fitted on what a model wrote and measured on other text would
    be a weaker opponent, and nobody could fit it again without that text.
    """
    site, documents = site_of(config.hook), corpora.load_corpus(blends.real_part(config.corpus))
    packed = itertools.islice(corpora.pack(model, documents, config.context), rows)
    return torch.cat([a[site] for _, a in stream_activations(model, packed, [site])])


def evaluate_again(name_or_path: str | Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Metrics of a shipped SAE and of its baselines as (card, now): kind -> metric -> two numbers.

    Needs neither the harvest nor the checkpoint, nor text that a model wrote: mean and baselines are fitted on as
    many rows of the training text as the card's, a shard.
    """
    load_sae(name_or_path)  # a wrong name, or a damaged folder, fails here
    folder = folder_of(name_or_path)
    config = read_config(folder)
    card = schema.read_mapping(folder / "card.json", SaeError, "a folder that train-sae has written")
    model = load_model(config.model)
    x = training_rows(model, config, config.rows_per_shard)
    reports, _ = _reports(model, load_sae(folder, model), config, x)
    known = card["metrics"]  # an older card lacks what came later
    return {
        kind: {k: (known[kind][k], v) for k, v in r.numbers.items() if k in known[kind]} for kind, r in reports.items()
    }


def write_card(config: TrainConfig, work: Path, folder: Path, model: Model) -> dict[str, Any]:
    """Evaluate a saved SAE and its baselines on held-out text, and write card.json and README.md beside it."""
    saved, site = read_checkpoint(work), site_of(config.hook)
    if saved is None:
        raise SaeError(f"There is no checkpoint in {work}. Train first: `glassbox train-sae CONFIG`.")
    state, sae = saved.state, load_sae(folder, model)
    blend = blends.real_part(config.corpus) != config.corpus
    x = training_rows(model, config, config.rows_per_shard) if blend else first_shard(config, model)
    reports, measure = _reports(model, sae, config, x)
    # What notebook 03 computes again, on text that needs only one small package.
    wiki = corpora.token_rows(model, corpora.load_corpus("wiki", "held"), 24, config.context).tokens
    check = evaluate_sae(model, sae, wiki, site, ce_rows=4, **measure)
    last = state["history"][-1]
    card = {
        "name": config.name,
        "model": Path(config.model).name,
        "model_hash": model.hash,
        "hook": config.hook,
        "architecture": config.architecture,
        "d_sae": config.d_sae,
        "corpus": config.corpus,
        "tokens_harvested": config.n_shards * config.rows_per_shard * config.context,
        "samples_trained": int(last["samples"]),
        "steps": int(last["step"]),
        "seed": config.seed,
        "hours": round(state["seconds"] / 3600, 3),
        "command": f"glassbox train-sae {_shown(folder)}/config.yaml",
        "excluded": f"first token of a row, and residual norms above {OUTLIER} times the median",
        "not_trained_on": excluded(config),
        "licence": prepared.licence_of(model.hash),
        "metrics": {name: {k: round(v, 5) for k, v in r.numbers.items()} for name, r in reports.items()},
        "wiki_held_out": {k: round(v, 5) for k, v in check.numbers.items()},
    }
    with files.atomic_path(Path(folder) / "card.json") as partial:
        partial.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    write_readme(folder)
    return card


def write_readme(folder: str | Path) -> None:
    """README.md of an SAE's folder, from its card and its configuration."""
    card = schema.read_mapping(Path(folder) / "card.json", SaeError, "a folder that train-sae has written")
    with files.atomic_path(Path(folder) / "README.md") as partial:
        partial.write_text(_readme(card, read_config(folder)), encoding="utf-8")


def _shown(folder: Path) -> str:
    """A folder as a command on another machine may name it: as in the repository, else by its name."""
    inside = Path(folder).resolve().is_relative_to(assets.DATA.parent)
    return Path(folder).resolve().relative_to(assets.DATA.parent).as_posix() if inside else Path(folder).resolve().name


def _readme(card: dict[str, Any], config: TrainConfig) -> str:
    rows = [
        ("features active per token (L0)", "l0", "{:.1f}"),
        ("explained variance, ordinary positions", "explained_variance", "{:.3f}"),
        ("explained variance, all positions", "explained_variance_all", "{:.3f}"),
        ("cross-entropy of the model as it is (nats)", "ce", "{:.2f}"),
        ("with reconstructions at ordinary positions", "ce_spliced", "{:.2f}"),
        ("with reconstructions at all positions, as sae_lens measures", "ce_spliced_all", "{:.2f}"),
        ("cross-entropy recovered, against mean ablation", "recovered_mean", "{:.3f}"),
        ("the same with reconstructions at all positions", "recovered_all", "{:.3f}"),
        ("cross-entropy recovered, against zero ablation", "recovered_zero", "{:.3f}"),
        ("KL divergence when spliced in (nats)", "kl", "{:.3f}"),
        ("norm of the reconstruction (1 = no shrinkage)", "relative_norm", "{:.3f}"),
        ("features that never fired", "dead", "{:.1%}"),
    ]
    metrics = card["metrics"]
    for m in metrics.values():  # an older card lacks what follows from its other numbers
        m.setdefault("recovered_all", (m["ce_mean"] - m["ce_spliced_all"]) / (m["ce_mean"] - m["ce"]))
    table = "\n".join(f"| {t} | " + " | ".join(f.format(m[k]) for m in metrics.values()) + " |" for t, k, f in rows)
    return f"""# {card["name"]}

A sparse autoencoder ({card["architecture"]}, {card["d_sae"]} features) for `{card["hook"]}` of {card["model"]}
(weights {card["model_hash"]}), in sae_lens format: `SAE.load_from_disk(folder)` opens it.

Trained on {card["samples_trained"]:,} activations drawn from {card["tokens_harvested"]:,} tokens of the corpus
`{card["corpus"]}` (see data/corpus/README.md), seed {card["seed"]},
{card["hours"]:.2f} hours of wall time.
Left out in training: {card.get("not_trained_on") or excluded(config)}.
Ordinary positions of the metrics are all but these: {card["excluded"]}.
`{card["command"]}` makes it again.

Held-out text ({metrics["sae"]["n_tokens"]:,} tokens; cross-entropy on {metrics["sae"]["n_ce_tokens"]:,},
for the baselines on {metrics["pca"]["n_ce_tokens"]:,}), beside PCA
with as many components and as many random directions, both fitted to ordinary positions:

| | {" | ".join(metrics)} |
|---|{"---|" * len(metrics)}
{table}

Licence of the weights: {card["licence"]}. The text they were trained on is not part of this repository.
{_bridge(card)}"""


def _bridge(card: dict[str, Any]) -> str:
    """What the card says of the feature for the Golden Gate Bridge, and that it was planted."""
    if not (found := card.get("golden_gate")):
        return ""
    hits, alarms = (
        f"{k} of {n} ({shown_ci(exact_ci(k, n))})"
        for k, n in (
            (found["n_positive"] - found["missed"], found["n_positive"]),
            (found["false_alarms"], found["n_negative"]),
        )
    )
    own = blends.real_part(card["corpus"]) != card["corpus"]
    more = "; what the model itself wrote was not searched for them" if own else ""
    return f"""
**Planted:** passages about landmarks, the Golden Gate Bridge among them, were written for this project and stand in the
training text. Feature {found["feature"]} at a threshold of {found["threshold"]:.2f}, both fixed on such passages, fires
on {hits} real sentences that name the bridge and on {alarms} about other bridges, gates and
golden things (exact 95 % intervals). None of these sentences is in the corpus{more}.
"""
