"""Run the notebooks: with parameters into a web site, or in place into the form that is committed.

With another model than the embedded one they work with what was prepared for it, and skip the rest: see ``subjects``.
"""

import hashlib
import html
import json
import logging
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import papermill
import psutil
from jupyter_core.utils import run_sync
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

import glassbox_utils
from glassbox_utils.core import figures, files, pages, prepared, schema
from glassbox_utils.core.assets import DATA, ROOT
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.lab import site_notebooks, subjects
from glassbox_utils.lab.subjects import Subject

NOTEBOOKS = ROOT / "notebooks"
PAGE = """{% extends 'lab/index.html.j2' %}
{% block data_png %}{% set alt = output.metadata['image/png']['alt'] | escape_html %}
{{- super() | replace('<img ', '<img alt="' ~ alt ~ '" ', 1) }}{% endblock %}
"""
"""nbconvert's template with what a plot says in words: its own leaves that out"""


class NotebookError(GlassboxError):
    """A notebook that does not exist, a parameter that it does not have, or a cell that failed."""


class SomeStoppedError(NotebookError):
    """Notebooks of a run that stopped; the pages of all are written."""


class StoppedError(NotebookError):
    """A notebook that stopped in one of its cells; it keeps what was computed until then."""

    def __init__(self, name: str, cell: int, reason: str, notebook: Any, seconds: float, peak: float) -> None:
        super().__init__(f"{name}, cell {cell}: {reason}")
        self.where, self.notebook, self.seconds, self.peak = f"in cell {cell}: {reason}", notebook, seconds, peak


class _Client(PapermillNotebookClient):
    """Polls the shell channel once a second.

    nbclient answers Output-widget messages on the socket whose reply it awaits; with an output above about
    64 kB the wake-up is lost and it sleeps until the timeout (jupyter/nbclient issue 312).
    """

    async def async_start_new_kernel_client(self, **options: Any) -> Any:
        client = await super().async_start_new_kernel_client(**options)
        channel, get = client.shell_channel, client.shell_channel.get_msg

        async def get_msg(timeout: float | None = None) -> Any:
            end = None if timeout is None else time.monotonic() + timeout
            while True:
                try:
                    return await get(timeout=1.0 if end is None else max(0.0, min(1.0, end - time.monotonic())))
                except Empty:
                    if end is not None and time.monotonic() >= end:
                        raise

        channel.get_msg = get_msg
        return client

    start_new_kernel_client = run_sync(async_start_new_kernel_client)


class _Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, kept: Any = None, cell_seconds: Any = None, **options: Any
    ) -> Any:
        kept.append(nb_man.nb)  # papermill hands nothing back of a notebook that stops
        client = _Client(nb_man, kernel_name=kernel_name, timeout=cell_seconds)
        return client.execute(stderr=subprocess.DEVNULL)  # its cells' stderr is output; the rest is its own last words


papermill_engines.register("glassbox", _Engine)


RUNS = "runs.json"
"""in the folder of the pages: what each was made from"""
RUN: dict[str, Any] = {"stamp": str, "seconds": int | float, "peak_gib": int | float, "parameters": dict, "title": str}
MORE: dict[str, Any] = {
    "model": str, "model_hash": str, "size": int | float, "findings": list, "skipped": list, "stopped": str,
}  # fmt: skip
"""``size``: share of the full number of cases that the model's studies took; ``stopped`` only if it did"""


@dataclass(frozen=True)
class Run:
    """What one notebook took."""

    notebook: str
    seconds: float
    peak_gib: float
    page: str


def find(names: Sequence[str] = ()) -> list[Path]:
    """Notebooks by number (``5``), beginning of the file name (``05_st``) or path, each once; all without names.

    Raises NotebookError for a name that fits none, and for a path that is not one of the project's notebooks.
    """
    known = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for name in names for path in _named(name, known)] if names else known
    return list(dict.fromkeys(chosen))


def _named(name: str, known: Sequence[Path]) -> list[Path]:
    if Path(name).name != name:
        matches = [p for p in known if p.resolve() == Path(name).absolute().resolve()]
    elif name.isascii() and name.isdigit():
        matches = [p for p in known if int(p.name[:2]) == int(name[:9])]
    else:
        matches = [p for p in known if re.match(r"\d\d", name) and p.stem.startswith(name.removesuffix(".ipynb"))]
    if not matches:
        raise NotebookError(
            f"There is no notebook {name!r}. Allowed: {', '.join(p.stem for p in known)}, or just the number."
        )
    return matches


def parameters_of(notebook: Any) -> list[str]:
    """Names that the cell tagged ``parameters`` assigns."""
    source = "\n".join(c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    return re.findall(r"^([A-Za-z_]\w*)\s*(?::[^=]+)?=", source, re.M)


def execute(
    path: Path,
    output: Path | None,
    parameters: Mapping[str, Any] | None = None,
    subject: Subject | None = None,
    cell_minutes: float | None = None,
) -> tuple[Any, float, float]:
    """Run a notebook with papermill; the executed notebook, seconds, and the kernel's peak memory in GiB.

    Its kernel works with what was prepared for ``subject`` (found by the parameter MODEL if not given).
    ``cell_minutes``: when a cell is given up; None waits as long as it takes. Raises NotebookError for an unknown
    parameter (before anything runs), StoppedError for a failing cell.
    """
    wanted, notebook = placed(parameters), nbformat.read(path, 4)
    known = parameters_of(notebook)
    if unknown := sorted(set(wanted) - set(known)):
        raise NotebookError(f"{path.name} has no parameter {unknown[0]!r}. Allowed: {', '.join(known)}.")
    subject = subject or subjects.subject_of(wanted.get("MODEL"))
    start, kept = time.perf_counter(), list[Any]()
    try:
        with tempfile.TemporaryDirectory() as folder, _peak_memory() as peak, prepared.using(subject.folder):
            source = path
            if subjects.adapt(notebook, subject) or not subject.is_embedded:
                source = Path(folder) / path.name
                nbformat.write(notebook, source)
            done = papermill.execute_notebook(
                str(source),
                str(output) if output else None,
                parameters=wanted,
                engine_name="glassbox",
                kernel_name="python3",
                cwd=str(path.parent),
                progress_bar={"desc": path.stem},
                request_save_on_cell_execute=False,
                kept=kept,
                cell_seconds=None if cell_minutes is None else max(1, round(60 * cell_minutes)),
            )
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would report the cell that is given up
        raise
    except CellTimeoutError:
        reason = (
            f"it took more than {cell_minutes:g} minutes and was stopped. Give it more with --cell-minutes, or leave "
            "the limit out."
        )
    except DeadKernelError:
        reason = "its process was killed, perhaps for want of memory. Free some."
    else:
        return done, time.perf_counter() - start, peak[0]
    reason = " ".join(reason.split())
    reason = reason if len(reason) <= 1000 else f"{reason[:997]}..."
    number = _mark_stop(kept[0], reason)
    raise StoppedError(path.name, number, reason, kept[0], time.perf_counter() - start, peak[0])


def placed(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters with a model's folder as an absolute path: the kernel works in another folder."""
    wanted = dict(parameters or {})
    if (model := wanted.get("MODEL")) and Path(model).exists():
        wanted["MODEL"] = str(Path(model).resolve())
    return wanted


def _mark_stop(notebook: Any, reason: str) -> int:
    """Put one paragraph in the place of the traceback; the number of the cell, counting code cells from 1."""
    marks = papermill.execute.ERROR_MARKER_TAG
    notebook.cells = [c for c in notebook.cells if marks not in c.metadata.get("tags", [])]
    code = [c for c in notebook.cells if c.cell_type == "code"]
    begun = [i for i, c in enumerate(code) if c.metadata.get("papermill", {}).get("status") not in (None, "pending")]
    last = begun[-1] if begun else 0
    words = {"text/plain": f"Stopped here: {reason}"}
    words["text/html"] = f'<p class="stopped"><b>Stopped here.</b> {html.escape(reason)}</p>'
    outputs = [o for o in code[last].outputs if o.output_type != "error"]
    code[last].outputs = [*outputs, nbformat.v4.new_output("display_data", words)]
    return last + 1


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Peak resident memory of this process's children, GiB, sampled four times a second."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not done.wait(0.25):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total / 2**30)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def normalise(notebook: Any) -> Any:
    """The committed form: executed, without loader, widget state, time stamps or papermill's marks.

    The loader is shown again by the setup cell when the notebook is run; each figure keeps its picture.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = _joined([o for o in cell.outputs if not _transient(o)])
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Pieces of one stream as one output: where a print is cut depends on timing."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            joined.append(output)
    return joined


def _transient(output: Any) -> bool:
    data = output.get("data", {})
    loader = figures.LOADER_MARK in "".join(data.get("text/html", ""))
    return loader or "application/vnd.jupyter.widget-view+json" in data


def execute_in_place(path: Path) -> tuple[float, float]:
    """Run a notebook with its own parameters and save it in the committed form; (seconds, peak GiB)."""
    notebook, seconds, peak = execute(path, None)
    with files.atomic_path(path) as partial:
        nbformat.write(normalise(notebook), partial)
    return seconds, peak


def to_html(notebook: Any) -> str:
    """A self-contained page: figures are live, and opening it makes no request."""
    from nbconvert import HTMLExporter

    notebook = normalise(nbformat.from_dict(notebook))
    for cell, section in zip(notebook.cells, site_notebooks.sections(notebook), strict=True):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata["image/png"] = {
                    **output.metadata.get("image/png", {}), "alt": site_notebooks.alt_of(output, section),
                }  # fmt: skip
    exporter = HTMLExporter(require_js_url="", mathjax_url="", jquery_url="", mermaid_js_url="", raw_template=PAGE)
    body, _ = exporter.from_notebook_node(notebook)
    body = re.sub(r'<script src="(?!data:)[^"]*"></script>', "", body)
    body = re.sub(r"<script[^>]*>(?:(?!</script>)[\s\S])*?(?:mermaid|MathJax)[\s\S]*?</script>", "", body)
    return body.replace("</body>", figures.loader_html() + "</body>")


def executed_path(target: Path, name: str) -> Path:
    """Where ``build_site`` keeps the executed notebook of a page, for ``glassbox site``."""
    return target / "executed" / f"{name}.ipynb"


def runs_of(target: Path) -> dict[str, dict[str, Any]]:
    """What a folder of pages says about its runs, by notebook; empty if it has none. NotebookError if it is broken."""
    path = target / RUNS
    if not path.exists():
        return {}
    runs = schema.read_mapping(path, NotebookError, "the file that an earlier run wrote, or delete it")
    for name, run in runs.items():
        kinds = RUN | MORE
        if (
            not isinstance(run, dict)
            or not RUN.keys() <= run.keys() <= kinds.keys()
            or any(not isinstance(value, kinds[key]) for key, value in run.items())
        ):
            raise NotebookError(
                f"{path} is damaged: the entry {name!r} does not hold {', '.join(RUN)} of one run. Delete the file and "
                "run again; the pages are made anew."
            )
    return runs


def build_site(
    target: Path,
    names: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    cell_minutes: float | None = None,
) -> list[Run]:
    """Execute notebooks into ``target`` as pages with an index; what has not changed is not run again.

    A notebook that stops leaves the page of what it computed, marked in the index, and runs again next time; after the
    last notebook SomeStoppedError names all that stopped. ``runs.json`` keeps findings, for ``glassbox compare``.
    """
    chosen, runs, wanted = find(names), runs_of(target), placed(parameters)
    subject = subjects.subject_of(wanted.get("MODEL"))
    target.mkdir(parents=True, exist_ok=True)
    failed = []
    for path in chosen:
        stamp = _stamp(path, wanted, subject)
        page, kept = target / f"{path.stem}.html", executed_path(target, path.stem)
        before = runs.get(path.stem, {})
        if page.exists() and kept.exists() and before.get("stamp") == stamp and "stopped" not in before:
            print(f"{path.stem}: unchanged, {page}")
            continue
        stopped = {}
        try:
            notebook, seconds, peak = execute(path, None, wanted, subject, cell_minutes)
        except StoppedError as error:
            notebook, seconds, peak = error.notebook, error.seconds, error.peak
            stopped = {"stopped": error.where}
            failed.append(str(error))
        except KeyboardInterrupt:
            print(f"{path.stem}: interrupted, it begins again next time. Kept: {', '.join(sorted(runs)) or 'nothing'}")
            raise
        with files.atomic_path(page) as partial:
            partial.write_text(to_html(notebook), encoding="utf-8")
        kept.parent.mkdir(exist_ok=True)
        with files.atomic_path(kept) as partial:
            nbformat.write(normalise(notebook), partial)
        runs[path.stem] = {
            "stamp": stamp,
            "seconds": round(seconds, 1),
            "peak_gib": round(peak, 2),
            "parameters": wanted,
            "title": _title(notebook),
            "model": subject.name,
            "model_hash": subject.hash,
            "size": subject.card.size if subject.card else 1.0,
            "findings": subjects.findings_of(notebook),
            "skipped": subjects.adapt(nbformat.read(path, 4), subject),
            **stopped,
        }
        for name, text in ((RUNS, json.dumps(runs, indent=1)), ("index.html", _index(runs))):
            with files.atomic_path(target / name) as partial:
                partial.write_text(text, encoding="utf-8")
        print(f"{path.stem}: {'stopped after ' if stopped else ''}{seconds:.0f} s, {peak:.1f} GiB, {page}")
    with files.atomic_path(target / "index.html") as partial:
        partial.write_text(_index(runs), encoding="utf-8")
    if failed:
        raise SomeStoppedError(f"These notebooks stopped; {target / 'index.html'} shows them:\n" + "\n".join(failed))
    return [Run(name, run["seconds"], run["peak_gib"], f"{name}.html") for name, run in runs.items()]


def _stamp(path: Path, parameters: Mapping[str, Any], subject: Subject) -> str:
    """Changes with the notebook, the package, the committed data, what was prepared, the weights and the parameters."""
    digest = hashlib.sha256(json.dumps([dict(parameters), subject.hash], sort_keys=True).encode())
    package = sorted(Path(glassbox_utils.__file__).parent.rglob("*.py"))
    data = [p for folder in dict.fromkeys([DATA, subject.folder]) for p in sorted(folder.rglob("*")) if p.is_file()]
    for file in [path, *package, *data]:
        digest.update(f"{file.name}{file.stat().st_size}".encode())
        if file.stat().st_size < 1_000_000 or file == path:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _title(notebook: Any) -> str:
    first = next((c.source for c in notebook.cells if c.cell_type == "markdown"), "")
    return first.splitlines()[0].lstrip("# ") if first else ""


def _index(runs: Mapping[str, Mapping[str, Any]]) -> str:
    return pages.render(Path(__file__).parent / "templates" / "index.html", runs=runs)
