"""What tests of harvest and training share: configurations on a tiny model, processes that die, ranks."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from glassbox_utils.core.models import Site
from glassbox_utils.saes.config import HarvestConfig, TrainConfig

HOOK = "blocks.1.hook_resid_post"
SITE = Site("resid_post", 1)


def harvest_config(folder, model="small", **changes):
    config = HarvestConfig(folder, (HOOK,), 4 * 8 * 32, "landmarks", "train", str(model), 32, 8, 4)
    return replace(config, **changes)


def train_config(shards, model="small", **changes):
    base = TrainConfig(
        name="tiny", hook=HOOK, architecture="topk", d_sae=64, samples=64 * 60, tokens=4 * 8 * 32, options={"k": 8},
        shards=str(shards), corpus="landmarks", model=str(model), context=32, rows_per_shard=8, shards_mixed=2,
        batch=64, lr=3e-3, warmup=5, reseed_every=20, checkpoint_every=10,
    )  # fmt: skip
    return replace(base, **changes)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if not p.name.startswith(".")}


def fatal(call, target, moment, arguments):
    """A script of ``call``, in which ``target`` writes half a file at its ``moment``-th call and is then killed."""
    return f"""
import os, signal, torch
from pathlib import Path
from glassbox_utils.core import checkpoints, distributed
from glassbox_utils.core.models import load_model
from glassbox_utils.saes import harvest, training
from glassbox_utils.saes.config import HarvestConfig, TrainConfig
calls = 0
def fatal(what, path, *rest, real={target}):
    global calls
    calls += 1
    if calls == {moment} and os.environ.get("RANK", "1") == "1":
        Path(path).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(what, path, *rest)
{target} = fatal
torch.set_num_threads(1)
{call.format(*map(repr, arguments))}
"""


def die_in(*script):
    """Run a ``fatal`` script in one process."""
    environment = os.environ | {"GLASSBOX_QUIET": "1", "OMP_NUM_THREADS": "1", "GLASSBOX_DTYPE": "bfloat16"}
    command = [sys.executable, "-c", fatal(*script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def two_ranks(*command, **environment):
    """Run a command of Python in two processes under torchrun; the finished process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {"GLASSBOX_QUIET": "1", "OMP_NUM_THREADS": "1", "GLASSBOX_DTYPE": "float32"} | environment
    return subprocess.run([*torchrun, *map(str, command)], env=os.environ | settings, capture_output=True, text=True)


def written(config, folder):
    """The configuration as a config.yaml in the folder."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    return folder / "config.yaml"
