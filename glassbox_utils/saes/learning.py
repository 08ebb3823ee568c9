"""Learn what to hold: features (or a vector) whose clamping makes the model write given answers."""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glassbox_utils.attention.attribution import resume
from glassbox_utils.core import coding
from glassbox_utils.core.arguments import some_texts, whole
from glassbox_utils.core.devices import beside, like, result
from glassbox_utils.core.interventions import capture, edit
from glassbox_utils.core.models import Model, Site, check_site
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch, tokenize
from glassbox_utils.saes import clamping, features, reading
from glassbox_utils.saes.config import hook_of

QUIET = 0.05
"""a feature that is learned fires at most at this share of the positions of answers that have nothing to do with it"""
START_TOKENS, START_WEIGHT = 4, 2.0
"""an answer's first tokens decide what it is about: their mean loss counts twice as much as that of all others"""
CANDIDATES = 256
"""features that learning begins with"""
RATE = 0.0035
"""how far a step of learning moves what a feature writes, as a share of a typical norm: the same for any dictionary"""


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch of chats whose answers are the wanted ones, and what the unclamped model has at a site in it."""

    batch: Batch
    answer: Bool[Tensor, "row pos"]
    resid: Float[Tensor, "row pos width"]
    site: Site


@torch.no_grad()
def lessons(
    model: Model, where: int | Site, chats: Sequence[str], answers: Sequence[str], batch_size: int = 8, seed: int = 0
) -> list[Lesson]:
    """Chats with their answers, in batches drawn by ``seed``, read once up to ``where``: below it nothing changes.

    ``where``: the site that an SAE reads (``features.site_of_sae``); a number is the residual stream after that layer.
    ClampError for no chats, or another number of answers.
    """
    site = check_site(model, where if isinstance(where, Site) else Site("resid_post", where))
    chats = some_texts("chats", chats, clamping.ClampError)
    answers = some_texts("answers", answers, clamping.ClampError)
    if len(chats) != len(answers):
        raise clamping.ClampError(f"There are {len(chats)} chats and {len(answers)} answers. Give one for each.")
    whole("batch_size", batch_size, 1, clamping.ClampError)
    order = list(range(len(chats)))
    random.Random(seed).shuffle(order)
    found = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenize(model, [chats[i] + answers[i] for i in rows])
        before = torch.tensor([int(tokenize(model, chats[i]).attention_mask.sum()) for i in rows])
        answer = batch.attention_mask.cumsum(-1) > beside(before, batch.attention_mask)[:, None]
        found.append(Lesson(batch, answer, capture(model, batch, [site])[site].float(), site))
    return found


def lesson_loss(model: Model, lesson: Lesson, resid: Float[Tensor, "row pos width"]) -> Tensor:
    """``taught_loss`` if ``resid`` stands at the lesson's site; after a layer, only those above it are run."""
    site = lesson.site
    after = site.kind == "resid_post" and site.layer + 1 < model.n_layers
    with resume(model, site.layer + 1, resid) if after else edit(model, site, lambda x: like(resid, x)):
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


def effects(model: Model, sae: Any, given: Sequence[Lesson]) -> Float[Tensor, " d_sae"]:
    """Which features would make the model write these answers? The rise of their log-probability (nats,
    ``taught_loss``) for one unit more of each feature at every position.

    By gradient at the unclamped stream, massive positions left out: a direction and no size (choosing by effect: arXiv
    2505.20063). ClampError for lessons of another place than the SAE's.
    """
    clamping.check_sae(model, sae)
    _check_lessons(given, features.site_of_sae(sae))
    decoder = coding.rows(coding.tool(sae, model.device)).float()
    effect = torch.zeros(len(decoder))
    for lesson, keep in zip(given, _usual(model, sae, given), strict=True):
        with torch.enable_grad():
            push = torch.zeros_like(lesson.resid, requires_grad=True)
            (slope,) = torch.autograd.grad(lesson_loss(model, lesson, lesson.resid + push), push)
        with torch.no_grad():
            effect -= result((slope * keep).sum((0, 1)) @ decoder.T)
    return effect / len(given)


def firing(model: Model, sae: Any, given: Sequence[Lesson]) -> Float[Tensor, " d_sae"]:
    """Share of the lessons' positions at which each feature is active. ClampError as for ``effects``."""
    clamping.check_sae(model, sae)
    _check_lessons(given, features.site_of_sae(sae))
    with torch.no_grad():
        codes = [coding.encode(sae, x.resid)[x.batch.attention_mask.bool()] > 0 for x in given]
    return result(torch.cat(codes).float().mean(0))


def _usual(model: Model, sae: Any, given: Sequence[Lesson]) -> list[Tensor]:
    """For each lesson 0 at massive positions, else what a feature's row is multiplied by there."""
    massive, code = clamping.MASSIVE * reading.median_norm(model, sae), coding.tool(sae, model.device)
    return [(x.resid.norm(dim=-1, keepdim=True) <= massive) * coding.gain(code, x.resid) for x in given]


def random_dictionary(sae: Any, seed: int = 0) -> Any:
    """An SAE of the same shapes and norms whose rows mean nothing: the control of whatever is learned on a dictionary.

    Every decoder row is a random direction as long as the one it replaces, and the encoder reads along it, as long as
    its own column was; biases stay.
    """
    twin, generator = copy.deepcopy(sae), torch.Generator().manual_seed(seed)
    drawn = torch.nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=generator), dim=-1)
    rows = like(drawn, sae.W_dec)
    with torch.no_grad():
        twin.W_dec.copy_(rows * sae.W_dec.norm(dim=-1, keepdim=True))
        twin.W_enc.copy_(rows.T * sae.W_enc.norm(dim=0, keepdim=True))
    return twin


def learn_group(
    model: Model,
    sae: Any,
    given: Sequence[Lesson],
    n: int = 32,
    steps: int = 49,
    rate: float = RATE,
    name: str = "",
    seed: int = 0,
    usual: Sequence[Lesson] | None = None,
) -> tuple[clamping.Group, clamping.Group, list[float]]:
    """At most ``n`` features and the values to hold them at so that the model writes the lessons' answers.

    By effect, not by activation: of the features that are quiet in ``usual`` (answers that have nothing to do with
    what is taught; the lessons themselves if None, and then no feature can be learned that reads what it writes), the
    ``CANDIDATES`` whose activation would raise the answers' log-probability most (``effects``) are held at values above
    zero, which gradient descent finds. On the way the smallest are dropped: 4 n are left after a quarter of the steps,
    2 n after a third, n after half. Strength 1 holds each at the value that was learned. Returns the group, its control
    (features drawn by ``seed`` from the other quiet ones, at the same values), and the loss of each step. ClampError
    for lessons of another place than the SAE's, and for an SAE whose features are rarely quiet.
    """
    for what, value in (("n", n), ("steps", steps)):
        whole(what, value, 1, clamping.ClampError)
    writes = effects(model, sae, given)
    code = coding.tool(sae, model.device)
    decoder, keep = coding.rows(code).float(), _usual(model, sae, given)
    quiet = (firing(model, sae, given if usual is None else usual) <= QUIET) & (result(decoder.norm(dim=-1)) > 0)
    if int(quiet.sum()) < 2 * n:
        raise clamping.ClampError(f"Only {int(quiet.sum())} features are quiet on these answers: too few to learn {n}.")
    order = writes.masked_fill(~quiet, -torch.inf).argsort(descending=True)[: min(CANDIDATES, int(quiet.sum()))]
    order = beside(order, decoder)
    rows = decoder[order]
    with torch.no_grad():
        codes = [coding.encode(code, x.resid)[..., order].float() for x in given]
    values, alive = decoder.new_zeros(len(order)).requires_grad_(), decoder.new_ones(len(order)).bool()
    left = {int(steps * share): times * n for share, times in ((0.25, 4), (0.35, 2), (0.5, 1))}

    def loss_at(i: int) -> Callable[[Tensor], Tensor]:
        def function(held: Tensor) -> Tensor:
            on = alive.nonzero().flatten()
            push = (held[on] - codes[i][..., on]) @ rows[on]
            return lesson_loss(model, given[i], given[i].resid + push * keep[i])

        return function

    def after(step: int) -> None:
        values.clamp_(min=0)
        if step + 1 in left:
            worst = values.masked_fill(~alive, -1.0).argsort(descending=True)[left[step + 1] :]
            alive[worst] = False
        values.mul_(alive)

    written = torch.cat([x[x > 0] for x in keep]).mean()  # what a unit of activation adds to the stream
    usually = torch.cat([x.resid.norm(dim=-1)[x.batch.attention_mask.bool()] for x in given]).median()
    speed = rate * float(usually / written)
    history = _descend(values, [loss_at(step % len(given)) for step in range(steps)], speed, after)
    held, order = result(values), result(order)
    chosen = [(int(order[i]), float(held[i])) for i in held.argsort(descending=True) if held[i] > 0]
    others = sorted(set(quiet.nonzero().flatten().tolist()) - set(order.tolist())) or order.tolist()
    drawn = random.Random(seed).sample(others, min(len(chosen), len(others)))
    group = clamping.Group(tuple(clamping.feature(model, sae, i, v) for i, v in chosen), name)
    control = clamping.Group(
        tuple(clamping.feature(model, sae, i, v) for i, (_, v) in zip(drawn, chosen, strict=False)), "random"
    )
    return group, control, history


def _check_lessons(given: Sequence[Lesson], site: Site) -> None:
    if not given or not all(isinstance(lesson, Lesson) for lesson in given):
        raise clamping.ClampError("There are no lessons. Give what learning.lessons returns.")
    if others := {lesson.site for lesson in given} - {site}:
        raise clamping.ClampError(
            f"The lessons were read at {', '.join(map(hook_of, sorted(others)))}, asked for is {hook_of(site)}. Make "
            f"them with learning.lessons(model, Site({site.kind!r}, {site.layer}), ...)."
        )


def learn_vector(
    model: Model, where: int | Site, given: Sequence[Lesson], steps: int = 49, rate: float = 0.25
) -> tuple[Float[Tensor, " width"], list[float]]:
    """The vector that, added at every position, makes the model write the lessons' answers: no SAE in between.

    ``where`` as in ``lessons``; ClampError for lessons of another place.
    """
    _check_lessons(given, check_site(model, where if isinstance(where, Site) else Site("resid_post", where)))
    whole("steps", steps, 1, clamping.ClampError)
    vector = beside(torch.zeros(given[0].resid.shape[-1]), model.device).requires_grad_()

    def loss_at(i: int) -> Callable[[Tensor], Tensor]:
        return lambda push: lesson_loss(model, given[i], given[i].resid + push)

    history = _descend(vector, [loss_at(step % len(given)) for step in range(steps)], rate, lambda step: None)
    return result(vector), history
