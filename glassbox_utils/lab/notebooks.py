"""Run the notebooks: with parameters into a web site, or in place into the form that is committed."""

import hashlib
import json
import logging
import re
import subprocess
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
from glassbox_utils.core import figures, files, pages, schema
from glassbox_utils.core.assets import DATA, ROOT
from glassbox_utils.core.errors import GlassboxError

NOTEBOOKS = ROOT / "notebooks"

CELL_TIMEOUT = 1800
"""seconds; nbclient's own default is to wait for ever"""


class NotebookError(GlassboxError):
    """A notebook that does not exist, a parameter that it does not have, or a cell that failed."""


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
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        client = _Client(nb_man, kernel_name=kernel_name, timeout=CELL_TIMEOUT)
        return client.execute(stderr=subprocess.DEVNULL)  # its cells' stderr is output; the rest is its own last words


papermill_engines.register("glassbox", _Engine)


RUNS = "runs.json"
"""in the folder of the pages: what each was made from"""
RUN: dict[str, Any] = {"stamp": str, "seconds": int | float, "peak_gib": int | float, "parameters": dict, "title": str}


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


def execute(path: Path, output: Path | None, parameters: Mapping[str, Any] | None = None) -> tuple[Any, float, float]:
    """Run a notebook with papermill; the executed notebook, seconds, and the kernel's peak memory in GiB.

    Raises NotebookError for an unknown parameter (before anything runs) or a failing cell.
    """
    wanted = dict(parameters or {})
    known = parameters_of(nbformat.read(path, 4))
    if unknown := sorted(set(wanted) - set(known)):
        raise NotebookError(f"{path.name} has no parameter {unknown[0]!r}. Allowed: {', '.join(known)}.")
    start = time.perf_counter()
    try:
        with _peak_memory() as peak:
            notebook = papermill.execute_notebook(
                str(path),
                str(output) if output else None,
                parameters=wanted,
                engine_name="glassbox",
                kernel_name="python3",
                cwd=str(path.parent),
                progress_bar={"desc": path.stem},
                request_save_on_cell_execute=False,
            )
    except papermill.PapermillExecutionError as error:
        raise NotebookError(f"{path.name}, cell {error.exec_count}: {error.ename}: {error.evalue}") from error
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would report the cell that is given up
        raise
    except CellTimeoutError as error:
        raise NotebookError(f"{path.name}: a cell took more than {CELL_TIMEOUT} s and was stopped.") from error
    except DeadKernelError as error:
        raise NotebookError(f"{path.name}: its process was killed, perhaps for want of memory. Free some.") from error
    return notebook, time.perf_counter() - start, peak[0]


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
    exporter = HTMLExporter(require_js_url="", mathjax_url="", jquery_url="", mermaid_js_url="")
    body, _ = exporter.from_notebook_node(notebook)
    body = re.sub(r'<script src="(?!data:)[^"]*"></script>', "", body)
    body = re.sub(r"<script[^>]*>(?:(?!</script>)[\s\S])*?(?:mermaid|MathJax)[\s\S]*?</script>", "", body)
    return body.replace("</body>", figures.loader_html() + "</body>")


def runs_of(target: Path) -> dict[str, dict[str, Any]]:
    """What a folder of pages says about its runs, by notebook; empty if it has none. NotebookError if it is broken."""
    path = target / RUNS
    if not path.exists():
        return {}
    runs = schema.read_mapping(path, NotebookError, "the file that an earlier run wrote, or delete it")
    for name, run in runs.items():
        if not isinstance(run, dict) or run.keys() != RUN.keys() or any(not isinstance(run[k], RUN[k]) for k in RUN):
            raise NotebookError(
                f"{path} is damaged: the entry {name!r} does not hold {', '.join(RUN)} of one run. Delete the file and "
                "run again; the pages are made anew."
            )
    return runs


def build_site(target: Path, names: Sequence[str] = (), parameters: Mapping[str, Any] | None = None) -> list[Run]:
    """Execute notebooks into ``target`` as pages with an index; what has not changed is not run again.

    Raises NotebookError after the last notebook if one of them failed.
    """
    chosen, runs, stamp_file = find(names), runs_of(target), target / RUNS
    target.mkdir(parents=True, exist_ok=True)
    failed = []
    for path in chosen:
        stamp = _stamp(path, parameters)
        page = target / f"{path.stem}.html"
        if page.exists() and runs.get(path.stem, {}).get("stamp") == stamp:
            print(f"{path.stem}: unchanged, {page}")
            continue
        try:
            notebook, seconds, peak = execute(path, None, parameters)
        except NotebookError as error:
            failed.append(str(error))
            continue
        with files.atomic_path(page) as partial:
            partial.write_text(to_html(notebook), encoding="utf-8")
        runs[path.stem] = {
            "stamp": stamp,
            "seconds": round(seconds, 1),
            "peak_gib": round(peak, 2),
            "parameters": dict(parameters or {}),
            "title": _title(notebook),
        }
        with files.atomic_path(stamp_file) as partial:
            partial.write_text(json.dumps(runs, indent=1), encoding="utf-8")
        print(f"{path.stem}: {seconds:.0f} s, {peak:.1f} GiB, {page}")
    with files.atomic_path(target / "index.html") as partial:
        partial.write_text(_index(runs), encoding="utf-8")
    if failed:
        raise NotebookError("These notebooks failed:\n" + "\n".join(failed))
    return [Run(name, run["seconds"], run["peak_gib"], f"{name}.html") for name, run in runs.items()]


def _stamp(path: Path, parameters: Mapping[str, Any] | None) -> str:
    """Changes with the notebook, the package, the committed data and the parameters."""
    digest = hashlib.sha256(json.dumps(dict(parameters or {}), sort_keys=True).encode())
    package = sorted(Path(glassbox_utils.__file__).parent.rglob("*.py"))
    data = sorted(p for p in DATA.rglob("*") if p.is_file())
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
