"""Harvest and training beside sae_lens's own, on the embedded model. Run with ``make bench``.

Rivals take turns with ours, so that a busy machine slows all alike; the best round of each counts. What is printed is
measured; what is asserted is what the project promises.

On a CPU without bfloat16 units autocast is tens of times slower than float32: it is then timed on less work.
"""

import pytest
import torch
from datasets import Dataset
from turns import best_times

from glassbox_utils.core import corpora
from glassbox_utils.core.fast_forward import fast_dtype, quick
from glassbox_utils.core.models import Site, load_model
from glassbox_utils.saes.config import TrainConfig, hook_of
from glassbox_utils.saes.harvest import activations, measure_scaling, ordinary
from glassbox_utils.saes.training import build_sae, topk_gradients

ROUNDS, ROWS, CONTEXT = 5, 16, 256
D_SAE, K, BATCH, STEPS = 4096, 32, 2048, 4


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def tokens(model):
    return corpora.token_rows(model, corpora.load_corpus("wiki")[:200], ROWS, CONTEXT).tokens


def has_bfloat16():
    return fast_dtype() == torch.bfloat16


def alternating(functions, rounds=ROUNDS):
    """Best time of each function in seconds, by name."""
    return dict(zip(functions, best_times(*functions.values(), rounds=rounds), strict=True))


def test_harvest(model, tokens):
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore

    layer = model.n_layers // 2 - 1
    site, small = Site("resid_post", layer), quick(model)
    names = [name for name, module in model.hf.named_modules() if module is model.sites[site][0]]

    def store(autocast):
        return ActivationsStore(
            model=HookedProxyLM(model.hf, model.tokenizer, hook_names=names),
            dataset=Dataset.from_list([{"tokens": row.tolist()} for row in tokens]), streaming=False,
            hook_name=names[0], hook_head_index=None, context_size=CONTEXT, d_in=model.d_model, n_batches_in_buffer=2,
            total_training_tokens=tokens.numel(), store_batch_size_prompts=ROWS, train_batch_size_tokens=BATCH,
            prepend_bos=True, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
            autocast_lm=autocast,
        )  # fmt: skip

    plain, fast = store(False), store(True)

    def rival(which, rows):
        with torch.no_grad():
            which.get_activations(rows)

    some = tokens if has_bfloat16() else tokens[:1, :64]
    work = {
        "glassbox": (tokens, lambda: activations(small, tokens, [site])),
        "sae_lens": (tokens, lambda: rival(plain, tokens)),
        "sae_lens, autocast": (some, lambda: rival(fast, some)),
    }
    x = torch.randn(tokens.numel(), model.d_model).to(fast_dtype())
    w = torch.randn(model.d_model, model.config.intermediate_size).to(fast_dtype())
    out, products = x @ w, 60  # about as long as a pass

    def multiply():
        for _ in range(products):
            torch.mm(x, w, out=out)

    best = alternating({name: function for name, (_, function) in work.items()} | {"matmul": multiply})
    matmul = products * 2 * len(x) * w.numel() / best.pop("matmul")
    rate = {name: work[name][0].numel() / seconds for name, seconds in best.items()}
    weights = sum(p.numel() for name, p in model.hf.named_parameters() if _below(name, layer) and p.ndim == 2)
    # Scores and mixing: a position sees half of the context on average (what causal attention needs, no more).
    flops = 2 * weights + (layer + 1) * 2 * (CONTEXT + 1) * model.n_heads * model.d_head
    share = rate["glassbox"] * flops / matmul
    print("\nharvest, tokens/s: " + ", ".join(f"{name} {value:,.0f}" for name, value in rate.items()))
    print(f"computed in {fast_dtype()}, {share:.0%} of this machine's matmul rate in it, {matmul / 1e9:.0f} GFLOP/s")
    # sae_lens's default is float32: 1.7 times that needs a CPU that multiplies bfloat16 faster. Without one both do the
    # same products, and all that can be asked for is the same speed.
    assert rate["glassbox"] >= (1.7 if has_bfloat16() else 1.0) * rate["sae_lens"]
    assert rate["glassbox"] >= rate["sae_lens, autocast"]
    assert share >= 0.85


def _below(name, layer):
    """Does the parameter belong to a decoder layer up to ``layer``?"""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return bool(numbers) and numbers[0] <= layer


def test_training(model, tokens, tmp_path):
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    site = Site("resid_post", model.n_layers // 2 - 1)
    x = activations(quick(model), tokens, [site])[site].float()
    scaling = measure_scaling(x)
    flat = x[ordinary(x, scaling.median_norm)] * scaling.scale
    config = TrainConfig("bench", hook_of(site), "topk", D_SAE, BATCH * STEPS, 1, {"k": K}, batch=BATCH, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    batches = [flat[torch.randint(len(flat), (BATCH,), generator=generator)] for _ in range(STEPS)]
    losses = {}

    def ours():
        sae = build_sae(config, scaling)
        optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
        with torch.no_grad():
            for batch in batches:
                topk_gradients(sae, batch, fast_dtype())
                torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
                optimizer.step()
            losses["glassbox"] = loss(sae)

    def theirs(autocast, batches=batches):
        sae = build_sae(config, scaling)
        total, size = sum(map(len, batches)), len(batches[0])
        settings = SAETrainerConfig(total, size, lr=config.lr, lr_end=config.lr, autocast=autocast)
        SAETrainer(settings, sae, iter(batches)).fit()
        with torch.no_grad():
            losses["sae_lens, autocast" if autocast else "sae_lens"] = loss(sae)

    def loss(sae):
        return float((sae(batches[-1]) - batches[-1]).square().sum(-1).mean())

    some = batches if has_bfloat16() else [batches[0][:64]]
    work = {
        "glassbox": (batches, ours),
        "sae_lens": (batches, lambda: theirs(False)),
        "sae_lens, autocast": (some, lambda: theirs(True, some)),
    }
    best = alternating({name: function for name, (_, function) in work.items()}, 2)
    rate = {name: sum(map(len, work[name][0])) / seconds for name, seconds in best.items()}
    print(f"\ntraining (TopK, d_sae {D_SAE}, k {K}, batch {BATCH}), samples/s, set-up included: ", end="")
    print(", ".join(f"{name} {value:,.0f}" for name, value in rate.items()))
    print(f"loss after {STEPS} steps: {losses}")
    assert rate["glassbox"] >= 1.5 * rate["sae_lens"]
    assert rate["glassbox"] >= rate["sae_lens, autocast"]
    assert losses["glassbox"] <= losses["sae_lens"] * (1 + 1e-6)  # the same mathematics: only the order of sums differs
