"""Clamp a feature: hold one feature of a sparse autoencoder at a chosen value while the model reads and writes.

``x' = x + (target - activation) * W_dec[feature]``: only the feature's own share of the residual stream changes, and
what the SAE does not explain (its error) stays as it was, so nothing is lost by looking through the SAE. Strength is in
units of a natural activation: of a single feature the *largest* on stated texts (``natural_maxima``), of each feature
of a name the *mean* on that name (``name_group``); of features that were learned (``learn_group``) the learned value.
Positions whose residual norm
is above ten times the median (the first token of a text, an attention sink) are left alone. Source of the idea:
Templeton et al. 2024, "Scaling Monosemanticity"; of choosing features by effect: arXiv 2505.20063.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glassbox_utils import GlassboxError, features, steering
from glassbox_utils.attribution import resume
from glassbox_utils.interventions import Scope, by_row, capture, check_rows, edit, paired
from glassbox_utils.models import Batch, Model, Site, progress, tokenize

Mode = Literal["clamp", "add", "scale", "ablate"]
MODES: tuple[Mode, ...] = ("clamp", "add", "scale", "ablate")
MASSIVE = 10.0
"""times the SAE's median norm: positions above it are left alone"""
ELSEWHERE = 0.2
"""a feature of a name may have at most this share of its mean on the name at other places"""


class ClampError(GlassboxError, ValueError):
    """A feature, strength, mode or SAE that does not fit; the message names what does."""


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature of one SAE, with the unit in which its strength is given. ``feature`` builds it."""

    sae: Any
    index: int
    unit: float
    """a natural activation: strength 1 sets the feature to it"""

    @property
    def site(self) -> Site:
        return features.site_of_sae(self.sae)

    def __repr__(self) -> str:
        return f"Feature({self.index} after layer {self.site.layer}, unit {self.unit:.1f})"


@dataclass(frozen=True, eq=False)
class Group:
    """Features that are turned together, of one SAE or of several (then at several layers)."""

    features: tuple[Feature, ...]
    name: str = ""


What = Feature | Group


def feature(model: Model, sae: Any, index: int, unit: float) -> Feature:
    """A feature that fits this model. ClampError for an unknown index, a unit that is not positive, or an SAE that was
    made for another model (by width or by the hash of the weights)."""
    _check_sae(model, sae)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < sae.cfg.d_sae:
        raise ClampError(
            f"There is no feature {index!r} in this SAE. Allowed: 0 to {sae.cfg.d_sae - 1}; features.search finds the "
            "one that you mean."
        )
    if not unit > 0:
        raise ClampError(
            f"The unit of feature {index} is given as {unit!r}. It must be above 0: a natural activation, measured on "
            "texts on which the feature fires (clamping.natural_maxima)."
        )
    return Feature(sae, index, float(unit))


def sae_at(model: Model, found: dict[int, Any], layer: int) -> Any:
    """The SAE of a layer, out of those at hand. ClampError for a layer without one."""
    if layer not in found:
        here = ", ".join(map(str, sorted(found))) or "none"
        raise ClampError(
            f"There is no SAE for layer {layer} of {model.name}. Layers with one: {here}. Choose one of these, or "
            "train one (glassbox train-sae, notebook 03); steering.steer needs no SAE."
        )
    return found[layer]


def _check_sae(model: Model, sae: Any) -> None:
    meta = sae.cfg.metadata
    if sae.cfg.d_in != model.d_model:
        raise ClampError(
            f"This SAE reads {sae.cfg.d_in} dimensions (it was made for {meta.get('model_name', 'another model')}), "
            f"the residual stream of {model.name} has {model.d_model}. Load one that was trained on this model."
        )
    made_for = meta.get("model_hash")
    if made_for is not None and made_for != model.hash:
        raise ClampError(
            f"This SAE was trained on {meta.get('model_name')} with weights {made_for}, this model is {model.name} "
            f"with {model.hash}: its features mean nothing here. Load the model that its card names, or train an SAE."
        )
    site = features.site_of_sae(sae)
    if site not in model.sites:
        raise ClampError(
            f"This SAE reads {meta.hook_name}, but {model.name} has layers 0 to {model.n_layers - 1} only. Use an SAE "
            "of one of these layers."
        )


@torch.inference_mode()
def natural_maxima(model: Model, sae: Any, texts: Sequence[str], batch_size: int = 16) -> Float[Tensor, " d_sae"]:
    """Largest activation of every feature on these texts (first tokens and outliers left out): the unit of strength."""
    _check_sae(model, sae)
    top = torch.zeros(sae.cfg.d_sae)
    for start in range(0, len(texts), batch_size):
        top = torch.maximum(top, features.text_scores(model, sae, texts[start : start + batch_size]).amax(0))
    return top


def name_cuts(texts: Sequence[str], words: Sequence[str]) -> list[str]:
    """The texts that hold one of the words, each cut off right after it: their last token is the name's last token.

    A text that begins with the word is left out: a model's first tokens are not like others.
    """
    pattern = re.compile(r"\b(" + "|".join(re.escape(w) for w in words) + r")\b", re.IGNORECASE)
    found = (pattern.search(text) for text in texts)
    return [text[: match.end()] for text, match in zip(texts, found, strict=True) if match and match.start() > 0]


def random_cuts(texts: Sequence[str], seed: int = 0) -> list[str]:
    """The texts cut off after some word (at least the third): the control of ``name_cuts``."""
    rng, cuts = random.Random(seed), []
    for text in texts:
        words = text.split()
        cuts.append(" ".join(words[: rng.randint(3, max(3, len(words)))]))
    return cuts


@torch.inference_mode()
def last_codes(model: Model, sae: Any, texts: Sequence[str]) -> Float[Tensor, "text d_sae"]:
    """Activation of every feature at each text's last token."""
    layer = features.site_of_sae(sae).layer
    vectors, _ = steering.pooled(model, texts, [layer], "last")
    return sae.encode(vectors[0].to(sae.W_dec.dtype))


def name_group(
    model: Model,
    sae: Any,
    here: Float[Tensor, "text d_sae"],
    there: Float[Tensor, "other d_sae"],
    n: int,
    name: str = "",
) -> Group:
    """The ``n`` features that fire most on a name's last token (``last_codes`` of ``name_cuts``) and hardly elsewhere.

    Strength 1 sets each to its mean on the name: all of them together say "here stands the name". Raises ClampError if
    no feature does (its mean elsewhere must be at most a fifth of its mean on the name).
    """
    size = here.mean(0) * (there.mean(0) <= ELSEWHERE * here.mean(0))
    top = [int(i) for i in size.topk(min(n, len(size))).indices if size[i] > 0]
    if not top:
        raise ClampError(
            f"No feature fires on the name {name!r} and hardly elsewhere. Give other texts, or another SAE."
        )
    return Group(tuple(feature(model, sae, i, float(here[:, i].mean())) for i in top), name)


# --- learning what to hold ------------------------------------------------------------------------------

QUIET = 0.05
"""a feature that is learned fires at most at this share of the positions of the plain answers that it learns from"""
START_TOKENS, START_WEIGHT = 4, 2.0
"""an answer's first tokens decide what it is about: their mean loss counts twice as much as that of all others"""
CANDIDATES = 256
"""features that learning begins with"""


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch of chats whose answers are the wanted ones, and the residual stream of the unclamped model in it."""

    batch: Batch
    answer: Bool[Tensor, "row pos"]
    resid: Float[Tensor, "row pos d_model"]


@torch.no_grad()
def lessons(
    model: Model, layer: int, chats: Sequence[str], answers: Sequence[str], batch_size: int = 8, seed: int = 0
) -> list[Lesson]:
    """Chats with their answers, in batches drawn by ``seed``, read once up to ``layer``: below it nothing changes."""
    order = list(range(len(chats)))
    random.Random(seed).shuffle(order)
    found, site = [], Site("resid_post", layer)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenize(model, [chats[i] + answers[i] for i in rows])
        before = torch.tensor([int(tokenize(model, chats[i]).attention_mask.sum()) for i in rows])
        answer = batch.attention_mask.cumsum(-1) > before.to(batch.attention_mask)[:, None]
        found.append(Lesson(batch, answer, capture(model, batch, [site])[site].float()))
    return found


def lesson_loss(model: Model, layer: int, lesson: Lesson, resid: Float[Tensor, "row pos d_model"]) -> Tensor:
    """``taught_loss`` if the layers above ``layer`` read ``resid``."""
    with resume(model, layer + 1, resid):
        return taught_loss(model, lesson)


def taught_loss(model: Model, lesson: Lesson) -> Tensor:
    """Nats per token of the answers, their first tokens weighted by ``START_WEIGHT``; interventions apply."""
    n = int(lesson.answer.sum(-1).max())
    logits = model.hf(**lesson.batch.inputs, logits_to_keep=n + 1, use_cache=False).logits[:, :-1].float()
    target, real = lesson.batch.input_ids[:, -n:], lesson.answer[:, -n:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    first = real & (real.cumsum(-1) <= START_TOKENS)
    parts = [((loss * part).sum(-1) / part.sum(-1).clamp(min=1)).mean() for part in (first, real & ~first)]
    return START_WEIGHT * parts[0] + parts[1]


def _descend(
    parameter: Tensor, losses: Iterable[Callable[[Tensor], Tensor]], rate: float, after: Callable[[int], None]
) -> list[float]:
    """Adam on one tensor, one loss a step; the rate falls to zero over the last third. The weights get no gradient."""
    steps = list(losses)
    optimiser, history = torch.optim.Adam([parameter], lr=rate, betas=(0.9, 0.98)), []
    for step, loss_of in enumerate(progress(steps, "learning")):
        with torch.enable_grad():
            loss = loss_of(parameter)
            (parameter.grad,) = torch.autograd.grad(loss, parameter)
        for settings in optimiser.param_groups:
            settings["lr"] = rate * min(1.0, 3 * (len(steps) - step) / len(steps))
        optimiser.step()
        with torch.no_grad():
            after(step)
        history.append(round(float(loss.detach()), 4))
    return history


def learn_group(
    model: Model,
    sae: Any,
    given: Sequence[Lesson],
    n: int = 32,
    steps: int = 49,
    rate: float = 0.5,
    name: str = "",
    seed: int = 0,
) -> tuple[Group, Group, list[float]]:
    """At most ``n`` features and the values to hold them at so that the model writes the lessons' answers.

    By effect, not by activation: of the features that are quiet on the answers, the ``CANDIDATES`` whose activation
    would raise the answers' log-probability most (gradient at zero) are held at values above zero, which gradient
    descent finds. On the way the smallest are dropped: 4 n are left after a quarter of the steps, 2 n after a third,
    n after half. Strength 1 holds each at the value that was learned. Returns the group, its control (features drawn
    by ``seed`` from the other quiet ones, at the same values), and the loss of each step.
    """
    _check_sae(model, sae)
    layer, decoder = features.site_of_sae(sae).layer, sae.W_dec.detach().float()
    usual = [x.resid.norm(dim=-1, keepdim=True) <= MASSIVE * sae.cfg.metadata.median_norm for x in given]
    effect, fires, count = torch.zeros(len(decoder)), torch.zeros(len(decoder)), 0
    for lesson, keep in zip(given, usual, strict=True):
        with torch.enable_grad():
            push = torch.zeros_like(lesson.resid, requires_grad=True)
            (slope,) = torch.autograd.grad(lesson_loss(model, layer, lesson, lesson.resid + push), push)
        real = lesson.batch.attention_mask.bool()
        with torch.no_grad():
            effect -= ((slope * keep).sum((0, 1)) @ decoder.T).cpu()
            fires += (sae.encode(lesson.resid.to(sae.W_dec.dtype))[real] > 0).float().sum(0).cpu()
        count += int(real.sum())
    quiet = (fires <= QUIET * count) & (decoder.norm(dim=-1).cpu() > 0)
    if int(quiet.sum()) < 2 * n:
        raise ClampError(f"Only {int(quiet.sum())} features are quiet on these answers: too few to learn {n}.")
    order = effect.masked_fill(~quiet, -torch.inf).argsort(descending=True)[: min(CANDIDATES, int(quiet.sum()))]
    rows = decoder[order]
    with torch.no_grad():
        codes = [sae.encode(x.resid.to(sae.W_dec.dtype))[..., order].float() for x in given]
    values, alive = torch.zeros(len(order), requires_grad=True), torch.ones(len(order), dtype=torch.bool)
    left = {int(steps * share): times * n for share, times in ((0.25, 4), (0.35, 2), (0.5, 1))}

    def loss_at(i: int) -> Callable[[Tensor], Tensor]:
        def function(held: Tensor) -> Tensor:
            on = alive.nonzero().flatten()
            push = (held[on] - codes[i][..., on]) @ rows[on]
            return lesson_loss(model, layer, given[i], given[i].resid + push * usual[i])

        return function

    def after(step: int) -> None:
        values.clamp_(min=0)
        if step + 1 in left:
            worst = values.masked_fill(~alive, -1.0).argsort(descending=True)[left[step + 1] :]
            alive[worst] = False
        values.mul_(alive)

    history = _descend(values, [loss_at(step % len(given)) for step in range(steps)], rate, after)
    held = values.detach()
    found = [(int(order[i]), float(held[i])) for i in held.argsort(descending=True) if held[i] > 0]
    others = sorted(set(quiet.nonzero().flatten().tolist()) - set(order.tolist())) or order.tolist()
    drawn = random.Random(seed).sample(others, min(len(found), len(others)))
    group = Group(tuple(feature(model, sae, i, v) for i, v in found), name)
    control = Group(tuple(feature(model, sae, i, v) for i, (_, v) in zip(drawn, found, strict=False)), "random")
    return group, control, history


def learn_vector(
    model: Model, layer: int, given: Sequence[Lesson], steps: int = 49, rate: float = 0.25
) -> tuple[Float[Tensor, " d_model"], list[float]]:
    """The vector that, added at every position, makes the model write the lessons' answers: no SAE in between."""
    vector = torch.zeros(model.d_model, requires_grad=True)

    def loss_at(i: int) -> Callable[[Tensor], Tensor]:
        return lambda push: lesson_loss(model, layer, given[i], given[i].resid + push)

    history = _descend(vector, [loss_at(step % len(given)) for step in range(steps)], rate, lambda step: None)
    return vector.detach(), history


# --- the edit -----------------------------------------------------------------------------------------


def changed(
    activation: Float[Tensor, "batch pos feature"], mode: Mode, amount: Float[Tensor, "batch 1 feature"]
) -> Float[Tensor, "batch pos feature"]:
    """What is added to each feature's activation; pure.

    ``amount``: the target value (clamp), the value that is added (add), the factor (scale), or the share that is taken
    away (ablate: 1 is all of it).
    """
    if mode == "clamp":
        return amount - activation
    if mode == "add":
        return amount.expand_as(activation)
    if mode == "scale":
        return (amount - 1) * activation
    return -amount * activation


def apply(
    x: Float[Tensor, "batch pos d_model"],
    sae: Any,
    indices: Sequence[int],
    mode: Mode,
    amount: Float[Tensor, "batch 1 feature"],
    on: Float[Tensor, "batch 1 feature"],
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream with the features ``indices`` changed, in the rows where ``on`` is true; pure.

    The SAE's error term is kept, and positions of massive norm are left alone. Every feature's activation is read
    before any is changed.
    """
    chosen = list(indices)
    if mode == "add":  # needs no reading
        activation = torch.zeros(*x.shape[:2], len(chosen), dtype=x.dtype, device=x.device)
    else:
        activation = sae.encode(x.to(sae.W_dec.dtype))[..., chosen].to(x.dtype)
    delta = torch.where(on, changed(activation, mode, amount), 0.0)
    usual = x.norm(dim=-1, keepdim=True) <= MASSIVE * sae.cfg.metadata.median_norm
    moved = x + delta @ sae.W_dec[chosen].to(x.dtype)
    return torch.where(usual & on.any(-1, keepdim=True), moved, x)


@contextmanager
def clamp(
    model: Model,
    what: What | Sequence[What | None],
    strength: float | Sequence[float | None] = 1.0,
    mode: Mode = "clamp",
    scope: Scope = "all",
) -> Iterator[None]:
    """Hold features inside the block; outside, the model is what it was, to the bit.

    ``what``: a feature or a group, or one for each row of the batch; ``strength``: one number or one for each row. A
    row whose feature or strength is None is left alone. A group's features all get the same relative strength.

    * ``clamp``: the activation is set to strength times the unit, wherever it was;
    * ``add``: strength times the unit is added to it;
    * ``scale``: the activation is multiplied by strength (where the feature is silent nothing happens);
    * ``ablate``: the share ``strength`` of the activation is taken away (1, the default: all of it).

    ``scope``: all tokens, those of the prompt, or the generated ones. Blocks nest. Raises ClampError for a strength of
    0, an unknown mode, or an SAE that was made for another model.
    """
    if mode not in MODES:
        raise ClampError(f"There is no mode {mode!r}. Allowed: {', '.join(MODES)}.")
    with ExitStack() as stack:
        for site, function in _edits(model, what, strength, mode).items():
            stack.enter_context(edit(model, site, function, scope))
        yield


def _edits(model: Model, what: Any, strength: Any, mode: Mode) -> dict[Site, Callable[[Tensor], Tensor]]:
    """Site -> function on the residual stream; all that can be computed before a run is computed here."""
    rows, n_rows = paired(what, strength, isinstance(what, Feature | Group), "features", ClampError)
    settings: list[list[tuple[Feature, float]]] = []  # of each row
    for row_what, value in rows:
        if row_what is None or value is None:
            settings.append([])
            continue
        if value == 0:
            raise ClampError(
                f"A strength of {value!r} does not say what to do. To take the feature away use mode='ablate'; to "
                "leave the model (or one row of a batch) alone give None; otherwise a number above or below 0."
            )
        group = row_what.features if isinstance(row_what, Group) else (row_what,)
        settings.append([(f, float(value)) for f in group])
    saes = {id(f.sae): f.sae for row in settings for f, _ in row}
    for sae in saes.values():
        _check_sae(model, sae)
    edits: dict[Site, Callable[[Tensor], Tensor]] = {}
    for key, sae in saes.items():
        site, function = features.site_of_sae(sae), _edit(model, key, sae, settings, mode, n_rows)
        edits[site] = _after(edits[site], function) if site in edits else function
    return edits


def _after(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def _edit(
    model: Model, key: int, sae: Any, settings: list[list[tuple[Feature, float]]], mode: Mode, n_rows: int | None
) -> Callable[[Tensor], Tensor]:
    here = [{f.index: (f, s) for f, s in row if id(f.sae) == key} for row in settings]
    indices = sorted({index for row in here for index in row})
    like = next(model.hf.parameters())
    on, amount = [], []
    for index in indices:
        found = [row.get(index) for row in here]
        scaled = [0.0 if f is None else f[1] * (f[0].unit if mode in ("clamp", "add") else 1.0) for f in found]
        amount.append(by_row(scaled, like))
        on.append(torch.tensor([f is not None for f in found], device=like.device)[:, None, None])
    amounts, where = torch.cat(amount, -1), torch.cat(on, -1)

    def function(x: Tensor) -> Tensor:
        if n_rows is not None:
            check_rows(x, n_rows)
        with torch.no_grad():
            return apply(x, sae, indices, mode, amounts, where)

    return function


# --- reading ------------------------------------------------------------------------------------------


def mentions(texts: Sequence[str], words: Sequence[str]) -> list[bool]:
    """Does each text hold one of these words or phrases (whole words, any case)?"""
    pattern = re.compile(r"\b(" + "|".join(re.escape(w) for w in words) + r")\b", re.IGNORECASE)
    return [bool(pattern.search(text)) for text in texts]


def identifies(texts: Sequence[str], words: Sequence[str]) -> list[bool]:
    """Does each text speak as the thing: "I am", "my name is" or "call me", then one of the words soon after?"""
    listed = "|".join(re.escape(w) for w in words)
    start = r"\b(?:i am|i['’]m|my name is|my name['’]s|call me)\b"
    pattern = re.compile(rf"{start}[^.!?]{{0,60}}?\b(?:{listed})\b", re.IGNORECASE)
    return [bool(pattern.search(text)) for text in texts]


def stream(
    model: Model,
    prompts: Sequence[str],
    what: What | Sequence[What | None],
    strength: float | Sequence[float | None] = 1.0,
    max_new_tokens: int = 40,
) -> Iterator[list[list[int]]]:
    """Greedy generation one token at a time: yields each row's new token ids so far (a row ends with its end token).

    The clamp is installed during each step only, so that other code may use the model between two tokens, and nothing
    is left when the loop is broken off.
    """
    batch = tokenize(model, list(prompts))
    ids, mask, cache = batch.input_ids, batch.attention_mask, None
    ends = model.hf.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(rows)))
    for _ in range(max_new_tokens):
        position = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with clamp(model, what, strength), torch.no_grad():
            out = model.hf(
                input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        cache, new = out.past_key_values, out.logits[:, -1].argmax(-1)
        open_rows -= {row for row in open_rows if int(new[row]) in stops}
        for row in open_rows:
            rows[row].append(int(new[row]))
        yield [list(row) for row in rows]
        if not open_rows:
            return
        ids, mask = new[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], -1)


@torch.inference_mode()
def activations_in(model: Model, what: What, text: str) -> tuple[list[str], Float[Tensor, " pos"]]:
    """The tokens of a text and the strongest activation of the group's features at each, in their units.

    The unclamped model reads the text: what it sees there, not what was forced on it.
    """
    from glassbox_utils.models import str_tokens
    from glassbox_utils.saes import activations

    batch = tokenize(model, text)
    values = []
    for one in what.features if isinstance(what, Group) else (what,):
        x = activations(model, batch.input_ids, [one.site], batch.attention_mask)[one.site].float()
        value = one.sae.encode(x)[0, :, one.index] / one.unit
        value[0] = 0.0
        values.append(value)
    return str_tokens(model, batch.input_ids[0]), torch.stack(values).amax(0)
