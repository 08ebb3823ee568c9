"""Clamp a feature: hold one feature of a sparse autoencoder at a chosen value while the model reads and writes.

``x' = x + (target - activation) * W_dec[feature]``: only the feature's own share of the residual stream changes, and
what the SAE does not explain (its error) stays as it was, so nothing is lost by looking through the SAE. Strength is in
units of a natural activation: of a single feature the *largest* on stated texts (``natural_maxima``), of each feature
of a name the *mean* on that name (``name_group``); of features that were learned (``learn_group``) the learned value.
Positions whose residual norm
is above ten times the median (the first token of a text, an attention sink) are left alone. Source of the idea:
Templeton et al. 2024, "Scaling Monosemanticity"; of choosing features by effect: arXiv 2505.20063.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glassbox_utils.core import caches, coding
from glassbox_utils.core.arguments import shown, some_texts, whole
from glassbox_utils.core.devices import beside, like, result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.interventions import Scope, capture, edits, largest_push, paired
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.text import str_tokens, tokenize
from glassbox_utils.saes import detection, reading
from glassbox_utils.saes.harvest import activations
from glassbox_utils.saes.reading import site_of_sae

Mode = Literal["clamp", "add", "scale", "ablate"]
MODES: tuple[Mode, ...] = ("clamp", "add", "scale", "ablate")
MASSIVE = 10.0
"""times the SAE's median norm: positions above it are left alone"""
LAST_BATCH = 16
"""texts that ``last_codes`` reads at a time"""
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
        return site_of_sae(self.sae)

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
    check_sae(model, sae)
    index = reading.check_index(index, sae.cfg.d_sae, ClampError)
    if isinstance(unit, bool) or not isinstance(unit, Real) or not 0 < unit < math.inf:
        raise ClampError(
            f"The unit of feature {index} is given as {shown(unit)}. It must be a number above 0: a natural "
            "activation, measured on texts on which the feature fires (clamping.natural_maxima)."
        )
    return Feature(sae, index, float(unit))


def sae_at(model: Model, found: dict[int, Any], layer: int) -> Any:
    """The SAE of a layer, out of those at hand. ClampError for a layer without one."""
    if layer not in found:
        here = ", ".join(map(str, sorted(found))) or "none"
        raise ClampError(
            f"There is no SAE for layer {layer} of {model.name}. Layers with one: {here}. Choose one of these, or "
            "train one (glassbox train-sae, notebook 03); gb.steer needs no SAE."
        )
    return found[layer]


def check_sae(model: Model, sae: Any) -> None:
    """ClampError for an SAE that does not fit this model: see ``reading.check_fits``."""
    reading.check_fits(model, sae, ClampError)


@torch.inference_mode()
def natural_maxima(model: Model, sae: Any, texts: Sequence[str], batch_size: int = 16) -> Float[Tensor, " d_sae"]:
    """Largest activation of every feature on these texts (first tokens and outliers left out): the unit of strength.

    ClampError for an SAE that does not fit, or an empty list.
    """
    check_sae(model, sae)
    texts = some_texts("texts", texts, ClampError)
    whole("batch_size", batch_size, 1, ClampError)
    top = torch.zeros(sae.cfg.d_sae)
    for start in range(0, len(texts), batch_size):
        top = torch.maximum(top, detection.text_scores(model, sae, texts[start : start + batch_size]).amax(0))
    return top


def name_cuts(texts: Sequence[str], words: Sequence[str]) -> list[str]:
    """The texts that hold one of the words, each cut off right after it: their last token is the name's last token.

    A text that begins with the word is left out: a model's first tokens are not like others.
    """
    words = some_texts("words", words, ClampError)
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
    """Activation of every feature at each text's last token, where the SAE reads. ClampError for an empty list."""
    check_sae(model, sae)
    site, texts, codes = site_of_sae(sae), some_texts("texts", texts, ClampError), []
    for start in range(0, len(texts), LAST_BATCH):
        batch = tokenize(model, texts[start : start + LAST_BATCH])
        last = capture(model, batch, [site])[site][:, -1].float()
        codes.append(result(coding.encode(sae, last)))
    return torch.cat(codes)


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
    no feature does (its mean elsewhere must be at most a fifth of its mean on the name), or for no text.
    """
    whole("n", n, 1, ClampError)
    if not (len(here) and len(there)):
        raise ClampError(f"There are {len(here)} texts with the name and {len(there)} without. Give at least one each.")
    size = here.mean(0) * (there.mean(0) <= ELSEWHERE * here.mean(0))
    top = [int(i) for i in size.topk(min(n, len(size))).indices if size[i] > 0]
    if not top:
        raise ClampError(
            f"No feature fires on the name {name!r} and hardly elsewhere. Give other texts, or another SAE."
        )
    return Group(tuple(feature(model, sae, i, float(here[:, i].mean())) for i in top), name)


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


class Handle(NamedTuple):
    """What holding some features of an SAE needs at every step, on the model's device, in the SAE's own type."""

    read: Callable[[Tensor], Tensor] | None
    """stream -> activations of the features, [batch, pos, feature]; None if the mode needs none"""
    write: Float[Tensor, "feature width"]
    massive: float
    """positions of a larger norm are left alone"""
    gain: Callable[[Tensor], Tensor | float]
    """stream -> what ``write`` is multiplied by at each position: the SAE may normalise what it reads"""


def handle(sae: Any, indices: Sequence[int], mode: Mode, device: torch.device, median_norm: float) -> Handle:
    """The chosen features, gathered once. Where a feature's activation does not depend on the others' (ReLU, JumpReLU)
    only the chosen ones are encoded: the same numbers but for the order of the sums, at a fraction of the cost."""
    tool, chosen = coding.tool(sae, device), beside(torch.tensor(list(indices)), device)
    write = coding.rows(tool)[chosen]
    read: Callable[[Tensor], Tensor] | None
    if mode == "add":
        read = None
    elif type(sae).__name__ in ("StandardSAE", "JumpReLUSAE"):
        columns, bias = tool.W_enc.detach()[:, chosen], tool.b_enc.detach()[chosen]
        threshold = tool.threshold.detach()[chosen] if hasattr(tool, "threshold") else None

        def read(x: Tensor) -> Tensor:
            before = tool.process_sae_in(like(coding.seen(tool, x), write)) @ columns + bias
            code = tool.activation_fn(before)
            return coding.numbers(tool, code if threshold is None else code * (before > threshold))

    else:

        def read(x: Tensor) -> Tensor:
            return coding.encode(tool, x).index_select(-1, chosen)

    return Handle(read, write, MASSIVE * median_norm, lambda x: coding.gain(tool, like(x, write)))


def apply(
    x: Float[Tensor, "batch pos d_model"],
    sae: Any,
    indices: Sequence[int],
    mode: Mode,
    amount: Float[Tensor, "batch 1 feature"],
    on: Bool[Tensor, "batch 1 feature"],
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream with the features ``indices`` changed, in the rows where ``on`` is true; pure.

    The SAE's error term is kept, and positions of massive norm are left alone. Every feature's activation is read
    before any is changed. ClampError for an SAE that does not say its median norm.
    """
    if (median := reading.stored_median(sae)) is None:
        raise ClampError("This SAE does not say what a usual norm is: set sae.cfg.metadata.median_norm, or use clamp.")
    return held(x, handle(sae, indices, mode, x.device, median), mode, amount, on)


def held(
    x: Float[Tensor, "batch pos d_model"],
    features: Handle,
    mode: Mode,
    amount: Float[Tensor, "#batch 1 feature"],
    on: Bool[Tensor, "#batch 1 feature"],
) -> Float[Tensor, "batch pos d_model"]:
    """``apply`` with what can be prepared before a run prepared. The SAE computes in its own type, the stream keeps
    its own."""
    if features.read is None:
        activation = torch.zeros(*x.shape[:2], len(features.write), dtype=features.write.dtype, device=x.device)
    else:
        activation = features.read(x)
    delta = torch.where(on, changed(activation, mode, amount), 0.0)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    moved = x + like((delta @ features.write) * features.gain(x), x)
    return torch.where((size <= features.massive) & on.any(-1, keepdim=True), moved, x)


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
    0 or one that is no finite number, an empty list or group, an unknown mode, or an SAE made for another model.
    """
    if mode not in MODES:
        raise ClampError(f"There is no mode {mode!r}. Allowed: {', '.join(MODES)}.")
    functions, n_rows = _edits(model, what, strength, mode)
    with edits(model, functions, scope, n_rows):
        yield


def _edits(
    model: Model, what: Any, strength: Any, mode: Mode
) -> tuple[dict[Site, Callable[[Tensor], Tensor]], int | None]:
    """Site -> function, all that can be computed before a run computed here; and the rows that they are for."""
    single = what is None or isinstance(what, Feature | Group)
    if not single and (isinstance(what, str) or not isinstance(what, Sequence)):
        raise ClampError(f"{what!r} is no feature. {_ALLOWED}")
    rows, n_rows = paired(what, strength, single, "features", ClampError)
    settings = [_row(one, value) for one, value in rows]
    saes = {id(f.sae): f.sae for row in settings for f, _ in row}
    for sae in saes.values():
        check_sae(model, sae)
    functions: dict[Site, Callable[[Tensor], Tensor]] = {}
    for key, sae in saes.items():
        site, function = site_of_sae(sae), _edit(model, key, sae, settings, mode)
        functions[site] = _after(functions[site], function) if site in functions else function
    return functions, n_rows


_ALLOWED = "Allowed: what gb.feature gives, a Group of such features, a list with one (or None) for each row."


def _row(what: Any, strength: float | None) -> list[tuple[Feature, float]]:
    """Features and relative strengths of one row."""
    if what is None or strength is None:
        return []
    if not isinstance(what, Feature | Group):
        raise ClampError(f"{what!r} is no feature. {_ALLOWED}")
    if strength == 0:
        raise ClampError(
            f"A strength of {strength!r} does not say what to do. To take the feature away use mode='ablate'; to "
            "leave the model (or one row of a batch) alone give None; otherwise a number above or below 0."
        )
    features = what.features if isinstance(what, Group) else (what,)
    if not features:
        raise ClampError(f"{what!r} holds no feature. Give a group that does, or None for this row.")
    for one in features:
        if not isinstance(one, Feature):
            raise ClampError(f"{shown(one)} in a group is no feature. {_ALLOWED}")
        reading.check_index(one.index, one.sae.cfg.d_sae, ClampError)
        if isinstance(one.unit, bool) or not isinstance(one.unit, Real) or not math.isfinite(one.unit):
            raise ClampError(f"The unit of {one!r} is no finite number. Build features with gb.feature.")
    return [(f, float(strength)) for f in features]


def _after(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def _edit(
    model: Model, key: int, sae: Any, settings: list[list[tuple[Feature, float]]], mode: Mode
) -> Callable[[Tensor], Tensor]:
    here = [{f.index: s * (f.unit if mode in ("clamp", "add") else 1.0) for f, s in row if id(f.sae) == key}
            for row in settings]  # fmt: skip
    indices = sorted({index for row in here for index in row})
    features = handle(sae, indices, mode, model.device, reading.median_norm(model, sae))
    amounts = torch.tensor([[row.get(index, 0.0) for index in indices] for row in here], dtype=features.write.dtype)
    if not (amounts.abs() <= largest_push(model)).all():
        raise ClampError(
            f"A strength times its feature's unit is {float(amounts.abs().max()):.3g}, more than {model.name} can hold "
            f"(up to {largest_push(model):.3g}). Useful strengths are around 1 to 10 of a feature's unit."
        )
    amount = beside(amounts, model.device)[:, None]
    on = beside(torch.tensor([[index in row for index in indices] for row in here]), model.device)[:, None]

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            return held(x, features, mode, amount, on)

    return function


# --- reading ------------------------------------------------------------------------------------------


def mentions(texts: Sequence[str], words: Sequence[str]) -> list[bool]:
    """Does each text hold one of these words or phrases (whole words, any case)?"""
    words = some_texts("words", words, ClampError)
    pattern = re.compile(r"\b(" + "|".join(re.escape(w) for w in words) + r")\b", re.IGNORECASE)
    return [bool(pattern.search(text)) for text in texts]


def identifies(texts: Sequence[str], words: Sequence[str]) -> list[bool]:
    """Does each text speak as the thing: "I am", "my name is" or "call me", then one of the words soon after?"""
    words = some_texts("words", words, ClampError)
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
    is left when the loop is broken off. ClampError for what ``clamp`` refuses, and for a number of tokens that is none.
    """
    whole("max_new_tokens", max_new_tokens, 1, ClampError)
    batch = tokenize(model, list(prompts))
    ids, mask, cache = batch.input_ids, batch.attention_mask, None
    ends = model.hf.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    functions, n_rows = _edits(model, what, strength, "clamp")
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(rows)))
    for _ in range(max_new_tokens):
        position = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with edits(model, functions, n_rows=n_rows), torch.no_grad():
            out = model.hf(
                input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1,
                **caches.handed(model.hf, cache),
            )  # fmt: skip
        cache, new = caches.left_by(out), out.logits[:, -1].argmax(-1)
        ids_now = new.tolist()
        open_rows -= {row for row in open_rows if ids_now[row] in stops}
        for row in open_rows:
            rows[row].append(ids_now[row])
        yield [list(row) for row in rows]
        if not open_rows:
            return
        ids, mask = new[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], -1)


@torch.inference_mode()
def activations_in(model: Model, what: What, text: str) -> tuple[list[str], Float[Tensor, " pos"]]:
    """The tokens of a text and the strongest activation of the group's features at each, in their units.

    The unclamped model reads the text: what it sees there, not what was forced on it.
    """
    batch = tokenize(model, text)
    values = []
    for one, _ in _row(what, 1.0):
        check_sae(model, one.sae)
        x = activations(model, batch.input_ids, [one.site], batch.attention_mask)[one.site].float()
        value = result(coding.encode(one.sae, x)[0, :, one.index] / one.unit)
        value[0] = 0.0
        values.append(value)
    return str_tokens(model, batch.input_ids[0]), torch.stack(values).amax(0)
