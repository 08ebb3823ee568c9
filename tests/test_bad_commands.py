"""What a user may type wrongly: exit code 2, one paragraph, nothing written, no model loaded, no waiting."""

import shlex
import time

import pytest
import transformers
import yaml

from glassbox_utils import cli
from glassbox_utils.core import assets, models

EXPLAIN = "explain --applicant good.json "
HUGE = "9" * 20
NOTEBOOK = (assets.ROOT / "notebooks" / "05_steering_vectors.ipynb").read_bytes()
CONFIG = yaml.safe_load((assets.DATA / "saes" / "topk-2048-l14" / "config.yaml").read_text(encoding="utf-8"))

FILES: dict[str, bytes] = {
    "good.json": (assets.DATA / "examples" / "applicant.json").read_bytes(),
    "there.txt": b"a file",
    "empty.json": b"",
    "list.json": b"[1, 2]",
    "null.json": b"null",
    "cut.json": b'{"name": "Emma", ',
    "binary.json": bytes(range(256)) * 10,
    "utf16.json": '{"name": "Emma"}'.encode("utf-16"),
    "deep.json": b'{"name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "number.json": b'{"name": ' + b"9" * 10_000 + b"}",
    "fields.json": b'{"nmae": "Emma"}',
    "nul.json": b'{"name": "Em\\u0000ma"}',
    "sites/empty/runs.json": b"",
    "sites/list/runs.json": b"[]",
    "sites/entry/runs.json": b'{"05_steering_vectors": 3}',
    "sites/half/runs.json": b'{"05_steering_vectors": {"stamp": "x"}}',
    "sites/deep/runs.json": b"[" * 100_000,
    "sites/binary/runs.json": bytes(range(128, 256)),
    "sites/folder/runs.json/x": b"",
    "05_steering_vectors.ipynb": NOTEBOOK,
    "empty/.keep": b"",
    "model/config.json": b"{",
    "adapter/adapter_config.json": b"{",
}
CONFIGS = {
    "unknown": CONFIG | {"kk": 3},
    "missing": {"name": "x"},
    "type": CONFIG | {"d_sae": "many"},
    "zero": CONFIG | {"tokens": 0},
    "negative": CONFIG | {"samples": -5},
    "nan": CONFIG | {"lr": float("nan")},
    "hook": CONFIG | {"hook": "blocks.1.nosuch"},
    "architecture": CONFIG | {"architecture": "nosuch"},
    "corpus": CONFIG | {"corpus": "nosuch"},
    "proc": CONFIG | {"shards": "/proc/shards"},
    "file": CONFIG | {"shards": "there.txt"},
    "long": CONFIG | {"shards": "s" * 300},
}
FILES |= {f"configs/{name}/config.yaml": yaml.safe_dump(values).encode() for name, values in CONFIGS.items()}
FILES |= {
    f"configs/{name}/config.yaml": text
    for name, text in {
        "nothing": b"",
        "list": b"- 1\n- 2\n",
        "broken": b"name: [",
        "binary": bytes(range(256)),
        "object": b"!!python/object/apply:os.system ['touch written']",
        "bomb": b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 122)),
    }.items()
}

COMMANDS = [
    "", "nosuch", "explain", "explain --applicant", "run --nosuch", "corpus a b", "corpus --tokens -5", "harvest",
    "harvest a b", "train-sae", "evaluate-sae", "study", "train-loans", "assets extra", "explain extra",
    # seeds and numbers
    *(f"{EXPLAIN} --seed {seed}" for seed in ("-1", HUGE, "4294967296", "1.5", "one", "''", "nan", "inf", "0x10")),
    *(f"train-loans x --bias age --seed {seed}" for seed in ("-1", HUGE, "1e3", "''")),
    f"{EXPLAIN} --n 0", "explain --applicant good.json --seed",
    # empty and impossible text
    *(f"{EXPLAIN} --{option} ''" for option in ("model", "out", "layout", "device", "dtype")),
    "explain --applicant ''", "explain --applicant '  '", "run ''", "run --site ''", "run --model ''", "execute ''",
    "corpus ''", "corpus --model ''", "harvest ''", "train-sae ''", "evaluate-sae ''", "study ''", "train-loans ''",
    "train-loans x --bias ''", "train-loans x --bias age --folder ''", "assets --device ''",
    # devices and types
    *(f"{command} --device {device}" for command in ("corpus", "assets", "run 05", "study saes", EXPLAIN)
      for device in ("tpu", "cuda:999", "-1", "cpu:x")),
    *(f"{command} --dtype {dtype}" for command in ("corpus", "harvest x", "train-loans x", EXPLAIN)
      for dtype in ("float8", "int8", "64", "FLOAT32", "'float32 '")),
    # places
    *(f"{EXPLAIN} --out {out}" for out in (
        "there.txt/page.html", "empty", ".", "/", "/proc/page.html", "/dev/null", "x" * 300, f"{'y' * 300}/page.html",
        "d/" * 2500 + "page.html", "'   '")),
    *(f"run 05 --site {site}" for site in ("there.txt", "there.txt/site", "/proc/site", "z" * 300)),
    *(f"run 05 --site sites/{site}" for site in ("empty", "list", "entry", "half", "deep", "binary", "folder")),
    *(f"train-loans x --bias age --folder {folder}" for folder in ("there.txt", "/proc/x", "w" * 300)),
    *(f"site --out {out}" for out in ("there.txt", "empty", "/proc/site", "''", "v" * 300)),
    *(f"site --out s --runs {runs}" for runs in ("nosuch", "there.txt", "empty", "sites/empty", "sites/half", "''")),
    *(f"site --out s {more}" for more in ("--features 0", "--features many", "--module nosuch", "--module ''",
                                        "--ask int3")),
    "serve nosuch", "serve empty", "serve there.txt", f"serve {'v' * 300}", "serve --port 99999", "serve --port x",
    "workshop 99", "workshop nosuch", "workshop --out there.txt", "workshop --out ''", "reproduce nosuch",
    "reproduce --quick --seed -1", "reproduce readme --out there.txt", "kit --out empty", "kit --notebook 99",
    "kit --out there.txt/kit.zip", "compat --python nosuch", "compat --notebook 99", "compat --versions oldest",
    # applicants
    *(f"explain --applicant {name}.json" for name in (
        "nosuch", "empty", "list", "null", "cut", "binary", "utf16", "deep", "number", "fields", "nul")),
    "explain --applicant empty", "explain --applicant /dev/null", f"explain --applicant {'a' * 5000}",
    "explain --applicant good.json/x", f"{EXPLAIN} --layout nosuch",
    # models
    *(f"{EXPLAIN} --model {model}" for model in (
        "nosuch", "empty", "there.txt", "good.json", "..", ".", "model", "adapter", "m" * 5000, "deployed/", "/proc")),
    "run 05 --model nosuch", "run 05 --model empty", "run 05 --model there.txt", "run 05 --model model",
    "run 05 --model a/b/c", "corpus landmarks --tokens --model nosuch", "corpus landmarks --model gpt2",
    # notebooks
    *(f"{command} {name}" for command in ("run", "execute") for name in (
        "99", "0", "nosuch", "05 nosuch", "../05_steering_vectors.ipynb", "./05_steering_vectors.ipynb", "there.txt",
        "steering", HUGE, "n" * 5000)),
    # corpora
    *(f"corpus {name}" for name in ("nosuch", "Mix", "a/b", "/nosuch/x", "there.txt", "wiki/", "/", "c" * 5000)),
    "corpus nosuch --tokens", "corpus own:nosuch", "corpus '50 % mix + 40 % own:a'", "write-text", "write-text ''",
    *(f"write-text {rest}" for rest in (
        "../x", "a --tokens 0", "a --tokens x", "a --model nosuch", f"a --seed {HUGE}")),
    # configurations
    *(f"{command} {name}" for command in ("harvest", "train-sae") for name in (
        "nosuch", "empty", "there.txt", "good.json", "/dev/null", "h" * 5000,
        *(f"configs/{name}" for name in CONFIGS),
        *(f"configs/{name}" for name in ("nothing", "list", "broken", "binary", "object", "bomb")))),
    # shipped things
    *(f"evaluate-sae {name}" for name in ("nosuch", "empty", "there.txt", "topk-2048-l14 nosuch", "e" * 5000)),
    *(f"train-loans {name}" for name in (
        "nosuch", "deployed nosuch", "deployed --seed 1", "deployed --folder x", "x --bias nosuch", "x --bias Age",
        "x y --bias age --folder f", "../x --bias age", "a/b --bias age", ".. --bias age", ".hidden --bias age")),
    *(f"train-officer {rest}" for rest in (
        "", "''", "nosuch", "empty", "there.txt", "hiring --steps 0", "hiring --steps x", "hiring --out there.txt",
        f"hiring --seed {HUGE}", "d" * 5000)),
    *(f"explain --decision {rest}" for rest in (
        "''", "nosuch H001", "empty H001", "there.txt H001", "hiring", "hiring ''", "hiring nosuch", "hiring H001 H002",
        f"hiring {'c' * 5000}", f"hiring {'c' * 5000}/x.json", "hiring empty",
        *(f"hiring {name}.json" for name in (
            "nosuch", "empty", "list", "null", "cut", "binary", "utf16", "deep", "number", "fields", "nul", "good")),
        "hiring H001 --template nosuch", "hiring H001 --layout line", "hiring H001 --applicant good.json",
        "hiring H001 --adapter nosuch", "hiring H001 --adapter empty", "hiring H001 --adapter adapter",
        "hiring H001 --model nosuch", "hiring H001 --model empty", "hiring H001 --out there.txt/x.html",
        "hiring H001 --out x.json", "hiring H001 --out empty", f"hiring H001 --seed {HUGE}",
        "hiring H001 --mitigation nosuch", "hiring H001 --mitigation list.json", "hiring H001 --mitigation good.json")),
    f"{EXPLAIN} --template line", f"{EXPLAIN} --adapter adapter", f"{EXPLAIN} H001",
    *(f"audit {rest}" for rest in (
        "", "--decision nosuch", "--decision empty", "--decision there.txt", "--decision hiring --n 0",
        "--decision hiring --out there.txt/x", "--decision hiring --adapter nosuch", "--decision hiring --model nosuch",
        f"--decision hiring --seed {HUGE}")),
    *(f"prepare {rest}" for rest in ("", "''", "nosuch", "empty", "there.txt", "adapter")),
    *(f"prepare model {rest}" for rest in (
        "--budget 0", "--budget -5", "--budget nan", "--budget soon", "--out there.txt", "--text nosuch",
        "--text good.json", "--text empty", "--corpus nosuch", "--corpus mix --sampled", "--corpus a/b")),
    *(f"{command} --prepared {folder}" for command in ("study saes", "run 05", EXPLAIN) for folder in (
        "nosuch", "empty", "there.txt")),
    *(f"compare {rest}" for rest in ("", "nosuch", "nosuch nosuch", "empty empty", "there.txt there.txt")),
    *(f"study {name}" for name in ("nosuch", "saes nosuch", "SAES", "heads_table", "s" * 5000)),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Importing torch and transformers takes seconds, once."""
    cli.studies()
    import sae_lens  # noqa: F401

    from glassbox_utils.core import corpora  # noqa: F401
    from glassbox_utils.lab import notebooks  # noqa: F401
    from glassbox_utils.saes import harvest, quality  # noqa: F401


@pytest.fixture()
def here(tmp_path, monkeypatch):
    """A folder with files of every kind; a cache of its own; no network; no model is loaded and no notebook run."""
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(models, "hub_answers", lambda: False)
    monkeypatch.setattr("glassbox_utils.core.corpora.hub_answers", lambda: False)

    def never(*_, **__):
        pytest.fail("began to work before all was checked")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", never)
    for name in ("fetch", "_download"):
        monkeypatch.setattr(assets, name, never)
    monkeypatch.setattr("glassbox_utils.lab.notebooks.execute", never)
    monkeypatch.setattr("glassbox_utils.core.corpora._collect", never)
    return tmp_path


def state(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if not p.is_dir()}


def test_there_are_enough():
    assert len(COMMANDS) == len(set(COMMANDS)) >= 200


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[:70])
def test_a_bad_command_is_one_paragraph(here, capsys, command):
    before, start = state(here), time.perf_counter()
    try:
        code = cli.main(shlex.split(command))
        paragraphs = 1
    except SystemExit as stopped:  # argparse: the usage, and one line
        code, paragraphs = stopped.code, 0
    took, said = time.perf_counter() - start, capsys.readouterr()
    assert code == 2, said.err
    assert "Traceback" not in said.out + said.err and "not foreseen" not in said.err and "\n\n" not in said.err
    assert said.err.count("glassbox: ") == 1 or not paragraphs
    assert said.err.startswith("glassbox: " if paragraphs else "usage: ")
    assert str(here / "cache") not in said.err, "the cache has nothing to do with it"
    assert state(here) == before and not (here / "written").exists()
    assert took < 2, f"{took:.1f} s"


@pytest.mark.parametrize(
    "command",
    [
        "explain --applicant bom.json",
        "explain --decision hiring H001 --template chat",
        EXPLAIN + "--seed 4294967295 --out new/page.html",
    ],
)
def test_a_good_command_goes_on_to_the_model(here, monkeypatch, command):
    """The table above is not passed by refusing everything."""

    class Reached(Exception):
        pass

    def reached(*_, **__):
        raise Reached

    (here / "bom.json").write_bytes(b"\xef\xbb\xbf" + FILES["good.json"])
    monkeypatch.setattr("glassbox_utils.decisions.loans.load_subject", reached)
    monkeypatch.setattr(models, "load_model", reached)
    monkeypatch.setattr(cli, "_unexpected", lambda error, args: 77 if isinstance(error, Reached) else pytest.fail())
    assert cli.main(shlex.split(command)) == 77
