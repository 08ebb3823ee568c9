"""Watch induction form: rows of random tokens that repeat, a small attention-only model, its training, its heads.

A row repeats itself at a distance that is drawn anew for each row. With one fixed distance a head could look back a
fixed number of places; that solves the rows, scores as induction on them, and fails on any other distance.

Positions are added to what queries and keys are made of, not to the stream (Press et al., arXiv 2012.15832), as in
TransformerLens' own attention-only models. ``glassbox study heads-forming`` says for how many seeds induction forms so,
with positions in the stream, with one layer, and with one layer and a fixed distance.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from glassbox_utils.core.arguments import whole
from glassbox_utils.core.devices import result
from glassbox_utils.core.models import ModelError
from glassbox_utils.core.session import progress

FORMED = 0.5
"""attention of the best head to where induction looks, above which induction counts as formed"""


@dataclass(frozen=True)
class Setup:
    """Rows, model and training of one run. ``ModelError`` for sizes that do not fit together."""

    n_layers: int = 2
    shortest: int = 8
    longest: int = 20
    """distances at which a row repeats, drawn evenly for each row; equal: one fixed distance"""
    n_context: int = 40
    vocabulary: int = 64
    d_model: int = 64
    n_heads: int = 2
    positions: Literal["queries and keys", "stream"] = "queries and keys"
    """where the position embedding is added"""
    steps: int = 300
    rows: int = 32
    """a step"""
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("n_layers", "shortest", "n_heads", "steps", "rows"):
            whole(name, getattr(self, name), 1, ModelError)
        if not self.shortest <= self.longest <= min(self.vocabulary, self.n_context - 1):
            raise ModelError(
                f"Distances of {self.shortest} to {self.longest} do not fit rows of {self.n_context} tokens out of "
                f"{self.vocabulary}. Allowed: shortest <= longest <= {min(self.vocabulary, self.n_context - 1)}."
            )
        if self.d_model % self.n_heads:
            raise ModelError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}. Choose one that is.")


def repeating_rows(setup: Setup, n: int, generator: torch.Generator) -> Int[Tensor, "n pos"]:
    """n rows: a block of different random tokens, again and again; its length is the distance of the repeats."""
    block = torch.rand(n, setup.vocabulary, generator=generator).argsort(-1)[:, : setup.longest]
    distance = torch.randint(setup.shortest, setup.longest + 1, (n, 1), generator=generator)
    return block.gather(1, torch.arange(setup.n_context) % distance)


class SmallModel(nn.Module):
    """Embedding, layers of causal attention with a norm in front, norm, unembedding: no MLP."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        d, self.setup = setup.d_model, setup
        self.embed = nn.Embedding(setup.vocabulary, d)
        self.place = nn.Parameter(torch.randn(setup.n_context, d))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(setup.n_layers + 1))
        self.read = nn.ModuleList(nn.Linear(d, 2 * d, bias=False) for _ in range(setup.n_layers))
        self.value = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(setup.n_layers))
        self.write = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(setup.n_layers))
        self.unembed = nn.Linear(d, setup.vocabulary, bias=False)

    def forward(
        self, tokens: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, "row pos vocab"], Float[Tensor, "row layer head dst src"]]:
        """Logits, and every head's pattern."""
        n, heads, stream = tokens.shape[1], self.setup.n_heads, self.embed(tokens)
        place, in_stream = self.place[:n], self.setup.positions == "stream"
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        stream, patterns = stream + place if in_stream else stream, []
        for norm, read, value, write in zip(self.norms, self.read, self.value, self.write, strict=False):
            x = norm(stream)
            q, k = read(x if in_stream else x + place).unflatten(-1, (2 * heads, -1)).transpose(1, 2).chunk(2, 1)
            v = value(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, float("-inf"))
            patterns.append(scores.softmax(-1))
            stream = stream + write((patterns[-1] @ v).transpose(1, 2).flatten(-2))
        return self.unembed(self.norms[-1](stream)), torch.stack(patterns, 1)


def where_induction_looks(tokens: Int[Tensor, "row pos"]) -> Bool[Tensor, "row dst src"]:
    """From each token to the tokens that followed its earlier copies."""
    copies = tokens[:, :, None] == tokens[:, None, :]
    return nn.functional.pad(copies, (1, 0))[..., :-1].tril()


class Scores(NamedTuple):
    """What a model does on rows that repeat."""

    loss: float
    """nats, of the tokens that a copy foretells"""
    induction: Float[Tensor, "layer head"]
    """attention to where induction looks, over the same tokens"""
    previous: Float[Tensor, "layer head"]
    """attention to the token before"""


@torch.no_grad()
def scores(model: SmallModel, tokens: Int[Tensor, "row pos"]) -> Scores:
    """Loss and head scores on rows, such as those of ``repeating_rows``."""
    logits, pattern = model(tokens)
    wanted = where_induction_looks(tokens)
    told = wanted.any(-1)
    losses = nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    looked = torch.einsum("blhds,bds->lh", pattern, wanted.float()) / told.sum()
    back = pattern.diagonal(-1, -2, -1).mean((0, -1))
    return Scores(float(losses[told[:, :-1]].mean()), result(looked), result(back))


class History(NamedTuple):
    """One training: measurements on rows that were never trained on, and the trained model."""

    steps: list[int]
    loss: list[float]
    induction: list[float]
    """of the head that has most at that step"""
    previous: list[float]
    elsewhere: Scores
    """at the end, on rows whose distance varies, whatever the model was trained on"""
    model: SmallModel

    @property
    def formed(self) -> bool:
        """Is there an induction head at the end, on rows whose distance varies?"""
        return bool(self.elsewhere.induction.max() > FORMED)

    @property
    def formed_at(self) -> int | None:
        """The first measured step at which the best head passes ``FORMED``."""
        return next((s for s, x in zip(self.steps, self.induction, strict=True) if x > FORMED), None)

    def numbers(self, digits: int = 4) -> dict[str, Any]:
        """All but the model, as plain values."""
        curves = {name: [round(x, digits) for x in getattr(self, name)] for name in ("loss", "induction", "previous")}
        last = {
            "loss": round(self.elsewhere.loss, digits),
            "induction": round(float(self.elsewhere.induction.max()), digits),
        }
        return {"steps": self.steps, **curves, "elsewhere": last, "formed": self.formed, "formed_at": self.formed_at}


def train(setup: Setup, seed: int = 0, every: int = 10) -> History:
    """Train on the next token of every place, and measure every ``every`` steps: a few seconds on one core."""
    torch.manual_seed(seed)
    model, generator = SmallModel(setup), torch.Generator().manual_seed(seed)
    unseen = torch.Generator().manual_seed(10_000 + seed)
    own, varied = (repeating_rows(s, 64, unseen) for s in (setup, Setup(n_context=setup.n_context)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=setup.learning_rate, weight_decay=0.01)
    found: list[tuple[float, float, float, float]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model waits longer for a second thread than it gains by one
    try:
        for step in progress(range(setup.steps + 1), f"{setup.n_layers} layers"):
            if step % every == 0:
                now = scores(model, own)
                found.append((step, now.loss, float(now.induction.max()), float(now.previous.max())))
            tokens = repeating_rows(setup, setup.rows, generator)
            loss = nn.functional.cross_entropy(model(tokens)[0][:, :-1].mT, tokens[:, 1:])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        steps, losses, induction, previous = ([row[i] for row in found] for i in range(4))
        return History([int(x) for x in steps], losses, induction, previous, scores(model, varied), model)
    finally:
        torch.set_num_threads(threads)
