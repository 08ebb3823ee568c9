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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.interventions import Scope, by_row, edits, paired
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.text import tokenize
from glassbox_utils.saes import detection
from glassbox_utils.saes.features import site_of_sae
from glassbox_utils.steering.fit import pooled

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
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < sae.cfg.d_sae:
        raise ClampError(
            f"There is no feature {index!r} in this SAE. Allowed: 0 to {sae.cfg.d_sae - 1}; gb.search finds the "
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
            "train one (glassbox train-sae, notebook 03); gb.steer needs no SAE."
        )
    return found[layer]


def check_sae(model: Model, sae: Any) -> None:
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
    site = site_of_sae(sae)
    if site not in model.sites:
        raise ClampError(
            f"This SAE reads {meta.hook_name}, but {model.name} has layers 0 to {model.n_layers - 1} only. Use an SAE "
            "of one of these layers."
        )


@torch.inference_mode()
def natural_maxima(model: Model, sae: Any, texts: Sequence[str], batch_size: int = 16) -> Float[Tensor, " d_sae"]:
    """Largest activation of every feature on these texts (first tokens and outliers left out): the unit of strength."""
    check_sae(model, sae)
    top = torch.zeros(sae.cfg.d_sae)
    for start in range(0, len(texts), batch_size):
        top = torch.maximum(top, detection.text_scores(model, sae, texts[start : start + batch_size]).amax(0))
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
    layer = site_of_sae(sae).layer
    vectors, _ = pooled(model, texts, [layer], "last")
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
    functions, n_rows = _edits(model, what, strength, mode)
    with edits(model, functions, scope, n_rows):
        yield


def _edits(
    model: Model, what: Any, strength: Any, mode: Mode
) -> tuple[dict[Site, Callable[[Tensor], Tensor]], int | None]:
    """Site -> function, all that can be computed before a run computed here; and the rows that they are for."""
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
        check_sae(model, sae)
    functions: dict[Site, Callable[[Tensor], Tensor]] = {}
    for key, sae in saes.items():
        site, function = site_of_sae(sae), _edit(model, key, sae, settings, mode)
        functions[site] = _after(functions[site], function) if site in functions else function
    return functions, n_rows


def _after(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def _edit(
    model: Model, key: int, sae: Any, settings: list[list[tuple[Feature, float]]], mode: Mode
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
    from glassbox_utils.core.text import str_tokens
    from glassbox_utils.saes.harvest import activations

    batch = tokenize(model, text)
    values = []
    for one in what.features if isinstance(what, Group) else (what,):
        x = activations(model, batch.input_ids, [one.site], batch.attention_mask)[one.site].float()
        value = one.sae.encode(x)[0, :, one.index] / one.unit
        value[0] = 0.0
        values.append(value)
    return str_tokens(model, batch.input_ids[0]), torch.stack(values).amax(0)
