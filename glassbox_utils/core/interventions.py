"""Change a forward pass and look what happens: every intervention is a context manager.

``edit`` is the one mechanism; the others say what the edit is. An edit is installed on the plain model and on
the bridge's twin at once, so that ``model.hf(...)``, ``generate(...)`` and ``model.bridge(...)`` all see it.
Hooks are removed when the block ends, also after an exception or Ctrl-C; nested blocks apply in order.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import caches
from glassbox_utils.core.models import Model, ModelError, Site, check_heads, check_site
from glassbox_utils.core.text import Batch

Scope = Literal["all", "prompt", "generated"]
"""Which tokens: all, those of the prompt only, or those that are generated (with a key-value cache) only."""
Head = tuple[int, int]
Positions = int | slice | Sequence[int] | Tensor | None
"""None: every position, generated ones included. Else an index into the positions of one forward pass;
a [batch] tensor gives each row its own position."""


@contextmanager
def edit(model: Model, site: Site, function: Callable[[Tensor], Tensor], scope: Scope = "all") -> Iterator[None]:
    """Replace the activation at ``site`` by ``function(activation)`` inside the block.

    ``function`` gets the tensor [batch, pos, width] of each forward pass (with a key-value cache a
    generated token arrives alone: pos is 1) and returns one of the same shape; it must not change its
    input in place. What it returns is brought to the stream's device and type, so that a float32 vector or a constant
    on the CPU can't change those. ``scope`` restricts the edit to prompt or to generated tokens. Raises ModelError for
    an unknown site or scope, in the pass for a result of another shape, and at the end of the block if the model ran
    in it but the site did not.

    When ``text.generate`` writes on a GPU, only the tensor operations of ``function`` are repeated for every token, not
    its Python code: see ``decoding``.
    """
    site = check_site(model, site)
    if scope not in ("all", "prompt", "generated"):
        raise ModelError(f"There is no scope {scope!r}. Allowed: all, prompt, generated.")
    if scope != "all":
        with _scoped(model, function, scope) as limited, edit(model, site, limited):
            yield
        return

    factor, passes, acted = model.factor(site), 0, 0

    def changed(x: Tensor) -> Tensor:
        nonlocal acted
        acted += 1
        if factor == 1:
            return _fitting(function(x), x, site)
        return _fitting(function(x * factor), x, site) / factor

    def count(_module: Any, _args: tuple) -> None:
        nonlocal passes
        passes += 1

    def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    def after(module: Any, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (changed(output[0]), *output[1:])
        return changed(output)

    handles: list[Any] = []
    try:
        for root in (model.hf, model.twin):
            handles.append(root.register_forward_pre_hook(count))
        for module in model.sites[site]:
            if site.kind in ("resid_pre", "z", "mlp_post"):
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after))
        yield
        if passes and not acted:
            raise ModelError(
                f"The edit at {site.kind} of layer {site.layer} never acted: {model.name} ran {passes} times inside "
                "the block, but that part of it did not run. Was the part replaced after the model was wrapped (wrap "
                "it again), or the layer skipped (attribution.resume)?"
            )
    finally:
        for handle in handles:
            handle.remove()


def _fitting(new: Any, x: Tensor, site: Site) -> Tensor:
    """What an edit returned, with the device and type of the activation; ModelError for another shape."""
    if not isinstance(new, Tensor) or new.shape != x.shape:
        got = f"a tensor of shape {tuple(new.shape)}" if isinstance(new, Tensor) else f"{new!r}"[:80]
        raise ModelError(
            f"The edit at {site.kind} of layer {site.layer} returned {got} for an activation of shape "
            f"{tuple(x.shape)}. Its function must return a tensor of that shape: the activation itself where nothing "
            "is to change, x.expand_as(activation) for one row that stands for all."
        )
    return new.to(x)


@contextmanager
def edits(
    model: Model, functions: Mapping[Site, Callable[[Tensor], Tensor]], scope: Scope = "all", n_rows: int | None = None
) -> Iterator[None]:
    """``edit`` at several sites at once: what steering, clamping and ablation come down to.

    ``n_rows``: number of rows that settings were given for (None: they hold for any batch); ModelError for a batch of
    another size.
    """

    def checked(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            check_rows(x, n_rows)
            return function(x)

        return look

    with ExitStack() as stack:
        for site, function in functions.items():
            stack.enter_context(edit(model, site, checked(function), scope))
        yield


@contextmanager
def _scoped(model: Model, function: Callable[[Tensor], Tensor], scope: Scope) -> Iterator[Callable[[Tensor], Tensor]]:
    """``function``, but only in passes over the prompt, or only in passes over a generated token."""
    generating = False

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        nonlocal generating
        # A prompt may be one token long, so the number of positions does not tell; a filled cache does.
        cache, ids = caches.among(kwargs), kwargs.get("input_ids")
        if kwargs.get("use_cache") is False and cache is None and scope == "generated":
            raise ModelError(
                "scope='generated' needs a key-value cache: without one the prompt is read again with every token. "
                "Generate with use_cache=True (the default), or use scope='all'."
            )
        filled = cache is not None and cache.get_seq_length() > 0
        generating = filled and (ids is None or ids.shape[1] == 1)

    handles = [root.register_forward_pre_hook(look, with_kwargs=True) for root in (model.hf, model.twin)]
    try:
        yield lambda x: function(x) if generating == (scope == "generated") else x
    finally:
        for handle in handles:
            handle.remove()


def by_row(values: float | Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Numbers as a column that broadcasts over [batch, pos, width]: a scalar, or one number for each row.

    Computed once before a run, with the type and device of ``like``. ModelError if there is no number.
    """
    column = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    if column.ndim > 1 or not column.isfinite().all():
        raise ModelError(f"Give one finite number, or one for each row of the batch, not {values!r}.")
    return column if column.ndim == 0 else column[:, None, None]


def largest_push(model: Model) -> float:
    """The longest vector that can be added to the stream: the model's numbers must hold it, and float32 its square,
    which norms are made of."""
    return min(torch.finfo(model.dtype).max, torch.finfo(torch.float32).max ** 0.5)


def paired(
    what: Any, amount: Any, single: bool, noun: str, error: type[Exception]
) -> tuple[list[tuple[Any, float | None]], int | None]:
    """What is done to each row: (what, how much), and the number of rows, None if one pair holds for all of them.

    ``what`` is one thing (``single``) or one for each row, ``amount`` one number or one for each row; None leaves a row
    alone. Raises ``error`` if there are unequally many or none at all, or for a strength that is no finite number.
    """
    amounts = amount.tolist() if hasattr(amount, "tolist") else amount
    several = isinstance(amounts, Sequence) and not isinstance(amounts, str)
    for one in amounts if several else [amounts]:
        if one is not None and (isinstance(one, bool) or not isinstance(one, Real) or not math.isfinite(one)):
            raise error(
                f"The strength {one!r} is no finite number. Allowed: numbers such as 0.5 or -1, one for all rows or "
                "one for each, and None for a row that is left alone."
            )
    if single and not several:
        return [(what, amounts)], None
    n_rows = len(amounts) if several else len(what)
    things = [what] * n_rows if single else list(what)
    numbers = list(amounts) if several else [amounts] * n_rows
    if len(things) != len(numbers):
        raise error(
            f"There are {len(things)} {noun} and {len(numbers)} strengths: give one for all, or as many of each as the "
            "batch has rows."
        )
    if not things:
        raise error(f"There are no {noun}: the list is empty. Give one for all rows, or one for each row of the batch.")
    return list(zip(things, numbers, strict=True)), n_rows


def check_rows(x: Tensor, rows: int | None) -> None:
    """ModelError unless the batch has as many rows as settings were given for (None: for any batch)."""
    if rows is not None and len(x) != rows:
        raise ModelError(
            f"Settings were given for {rows} rows, this batch has {len(x)}. Give one setting for all rows, or one for "
            "each prompt (beam search and num_return_sequences multiply the rows)."
        )


@contextmanager
def recording(model: Model, sites: Sequence[Site], keep: Callable[[Tensor], Tensor] | None = None) -> Iterator[dict]:
    """Record activations of every forward pass of the plain model inside the block.

    Yields a dict that fills up: Site -> the last pass's tensor, or ``keep(tensor)`` if given.
    """
    store: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            store[site] = keep(x) if keep else x
            return x

        return look

    from glassbox_utils.core.decoding import unrecorded  # imports transformers, which is there once a model is

    if not sites:
        raise ModelError("There is no site to record. Give at least one, such as Site('resid_post', 14).")
    with unrecorded(), edits(model, {site: reader(site) for site in (check_site(model, site) for site in sites)}):
        yield store


@torch.no_grad()
def capture(model: Model, batch: Batch, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "batch pos width"]]:
    """Activations at several sites from one forward pass of the plain model."""
    with recording(model, sites) as store:
        model.hf(**batch.inputs, logits_to_keep=1)
    return store


def not_first(batch: Batch) -> Tensor:
    """Boolean [batch, pos]: real tokens other than the first one of each row."""
    mask = batch.attention_mask.bool()
    return mask & (batch.attention_mask.cumsum(-1) > 1)


@contextmanager
def patch(
    model: Model,
    source: dict[Site, Tensor],
    heads: Sequence[Head] | None = None,
    positions: Positions = None,
) -> Iterator[None]:
    """Activation patching: put activations of another run (``capture``) in place inside the block.

    ``heads`` restricts the patch at ``z`` sites to those heads; ``positions`` to those positions. The
    source must have the same batch size and number of positions. Source: Meng et al., arXiv 2202.05262.
    """
    chosen = check_heads(model, heads) if heads is not None else None
    if not source or chosen == []:
        raise ModelError("There is nothing to patch: no site or no head is given. heads=None patches all heads.")
    if chosen is not None and (idle := {layer for layer, _ in chosen} - {s[1] for s in source if s[0] == "z"}):
        raise ModelError(
            f"Heads of layer {min(idle)} are named, but the source has no Site('z', {min(idle)}) for them."
        )

    def patching(site: Site, donor: Tensor) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            if x.shape != donor.shape:
                raise ModelError(
                    f"The patch for {site.kind} of layer {site.layer} has shape {tuple(donor.shape)}, this pass "
                    f"{tuple(x.shape)}. Source and target need equally many rows and tokens."
                )
            where = position_mask(x, positions)[..., None]
            if chosen is not None and site.kind == "z":
                only = torch.zeros(model.n_heads, dtype=torch.bool, device=x.device)
                only[[h for layer, h in chosen if layer == site.layer]] = True
                where = where & only.repeat_interleave(model.d_head)
            return torch.where(where, donor.to(x), x)

        return function

    with edits(model, {check_site(model, site): patching(check_site(model, site), x) for site, x in source.items()}):
        yield


def position_mask(x: Tensor, positions: Positions) -> Tensor:
    """Boolean [batch, pos]: the positions that an intervention applies to."""
    batch, pos = x.shape[:2]
    if isinstance(positions, bool):
        raise ModelError(
            f"Positions are {positions!r}. Give a whole number, a slice, a list of numbers, or None for all."
        )
    if positions is None:
        return torch.ones(batch, pos, dtype=torch.bool, device=x.device)
    where = torch.zeros(batch, pos, dtype=torch.bool, device=x.device)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.shape != where.shape:
            raise ModelError(f"The mask of positions has shape {tuple(positions.shape)}, this pass {(batch, pos)}.")
        return positions.to(x.device)
    if isinstance(positions, int | slice):
        if isinstance(positions, int) and not -pos <= positions < pos:
            raise ModelError(f"There is no position {positions}: this prompt has positions 0 to {pos - 1}.")
        where[:, positions] = True
        return where
    index = torch.as_tensor(positions, device=x.device)
    if not index.numel() or index.is_floating_point():
        raise ModelError(
            f"Positions are {positions!r:.80}. Give whole numbers, at least one, or None for all positions."
        )
    if index.numel() and (int(index.max()) >= pos or int(index.min()) < -pos):
        raise ModelError(f"Positions {index.tolist()} exceed this prompt, which has positions 0 to {pos - 1}.")
    if isinstance(positions, Tensor):  # one position for each row
        if len(index) != batch:
            raise ModelError(f"{len(index)} positions for {batch} rows: a tensor gives each row its own position.")
        where[torch.arange(batch, device=x.device), index] = True
    else:
        where[:, index] = True
    return where
