"""The executed notebooks as one static site, with what they found, their figures, features, terms and modules.

Sphinx with MyST-NB builds it: of the tools that are kept well, it is the one whose search, navigation and themes come
whole in wheels and work from a folder without a server. (Jupyter Book 2 needs Node, fetches its themes, and its pages
need a server.) Pages link relatively and ask no other host for anything.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat

from glassbox_utils.core import figures, files, prepared
from glassbox_utils.core.assets import DATA, ROOT
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.lab import notebooks, site_located, site_notebooks, site_pages, site_planted
from glassbox_utils.lab.site_notebooks import Lesson

SOURCE, DOCS = ROOT / "docs" / "site", ROOT / "docs"
NEEDED = {
    "sphinx": "sphinx",
    "myst_nb": "myst-nb",
    "pydata_sphinx_theme": "pydata-sphinx-theme",
    "latex2mathml": "latex2mathml",
}
MARK = ".glassbox-site"
"""in the folder of a site: it may be replaced"""
ORDER = ("scaling", "models")
"""of the pages in docs/ that come first among the references"""


class SiteError(GlassboxError):
    """A site that can't be built: what is missing, or which folder is not one."""


def check_tools() -> None:
    """SiteError with the command that installs what is missing."""
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise SiteError(
            f"The site is built by packages that are not installed: {', '.join(missing)}. `make site` installs them, "
            "or "
            "`pip install -r requirements-more.lock`. The notebooks' own pages, by `glassbox run`, need none of them."
        )


def check_modules(names: Sequence[str]) -> None:
    """SiteError for a module that there is not."""
    pairs = {name: name.partition(".")[::2] for name in names}
    package = ROOT / "glassbox_utils"
    if unknown := [
        name
        for name, (room, module) in pairs.items()
        if room not in site_pages.ROOMS or not module.isidentifier() or not (package / room / f"{module}.py").exists()
    ]:
        raise SiteError(
            f"There is no module {unknown[0][:80]!r}. Allowed: room and name, such as core.text or saes.store."
        )


def check_target(out: Path) -> Path:
    """The folder to write, or SiteError if it holds something that is no site: it would be replaced."""
    out = files.check_output(out, "--out", folder=True)
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists() and not _older(out):
        raise SiteError(f"{out} is a folder with other files, and a site would replace them. Give another --out.")
    return out


def _older(out: Path) -> bool:
    """Pages that `glassbox run` wrote into build/site before there was a site: runs.json, the index and its pages."""
    known = {notebooks.RUNS, "index.html", "executed", *(f"{path.stem}.html" for path in notebooks.find())}
    return (out / notebooks.RUNS).exists() and {path.name for path in out.iterdir()} <= known


def lessons_of(runs: Path | None = None) -> list[Lesson]:
    """The executed notebooks: those of a folder that ``glassbox run`` wrote, and the committed ones for the rest.

    Runs on another model than the embedded one are not mixed with committed outputs. SiteError for runs on several.
    """
    made = notebooks.runs_of(runs) if runs else {}
    kept = {name: path for name in made if (path := notebooks.executed_path(runs or Path(), name)).exists()}
    if runs and not kept:
        raise SiteError(
            f"{runs} holds no notebooks that were run. Give the --site of a `glassbox run`, or leave it out."
        )
    models = {made[name].get("model_hash") for name in kept}
    if len(models) > 1:
        raise SiteError(
            f"{runs} holds runs on {len(models)} models. Give each a folder of its own (`glassbox run --site`)."
        )
    committed = {} if models - {prepared.card(DATA).model_hash} else {path.stem: path for path in notebooks.find()}
    return [
        site_notebooks.read(path, made[name] if name in kept else None)
        for name, path in sorted({**committed, **kept}.items())
    ]


def of_embedded(lessons: Sequence[Lesson]) -> bool:
    """Whether they are about the embedded model, whose SAEs are shipped."""
    own = prepared.card(DATA).model_hash
    return all(lesson.run is None or lesson.run.get("model_hash") == own for lesson in lessons)


def build(
    out: Path,
    runs: Path | None = None,
    only: Sequence[str] = (),
    features: Mapping[str, str] | None = None,
) -> tuple[Path, list[str]]:
    """Build the site into ``out`` (replaced as a whole at the end); its first page, and what the tools warned of.

    ``runs``: a folder that ``glassbox run`` wrote. ``only``: modules with an API page; all without, none for ``("",)``.
    ``features``: file -> text of the pages about features (``site_features.pages``).
    """
    check_tools()
    out = check_target(out)
    lessons = lessons_of(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".glassbox-site-", dir=out.parent) as folder:
        source, made = Path(folder) / "source", Path(folder) / "made"
        write_sources(source, lessons, only, features or {})
        warnings = _sphinx(source, made)
        (made / MARK).write_text("made by `glassbox site`; replaced by the next\n", encoding="utf-8")
        if runs:
            shutil.copy(runs / notebooks.RUNS, made / notebooks.RUNS)
        for litter in (".buildinfo", ".doctrees", "objects.inv", "_static/webpack-macros.html"):
            path = made / litter
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if out.exists():
            out.rename(Path(folder) / "before")
        made.rename(out)
    return out / "index.html", warnings


def _power(source: Path) -> str:
    """The audit's power on penalties that are read from the text, and on trained officers as far as there are any."""
    studies, planted = DATA / "studies", DATA / "studies" / "planted_officers.json"
    page = site_pages.power(site_pages.load_table(studies / "audit_power.json"), source / "power.png")
    return page + ("\n" + site_planted.trained(site_pages.load_table(planted)) if planted.exists() else "")


def write_sources(source: Path, lessons: Sequence[Lesson], only: Sequence[str], features: Mapping[str, str]) -> None:
    """All pages as Sphinx reads them: what is written by hand, the notebooks, and what is made of data."""
    shutil.copytree(SOURCE, source)
    modules = site_pages.modules(ROOT / "glassbox_utils")
    modules = {name: words for name, words in modules.items() if not only or name in only}
    static, here = source / "_static", source / "notebooks"
    static.mkdir(exist_ok=True)
    here.mkdir()
    script = figures.loader_html().removeprefix("<script>").removesuffix("</script>")
    (static / "figures.js").write_text(script, encoding="utf-8")
    (static / "findings.json").write_text(as_json(lessons), encoding="utf-8")
    for lesson in lessons:
        nbformat.write(site_notebooks.page(lesson, modules), here / f"{lesson.name}.ipynb")
    texts: dict[str, str] = {
        "results.md": site_pages.results(lessons),
        "gallery.md": site_pages.gallery(lessons, static / "gallery"),
        "power.md": _power(source),
        "located.md": site_located.located(site_pages.load_table(DATA / "studies" / "locate.json"), source),
        "notebooks/index.md": _listed("Notebooks", [lesson.name for lesson in lessons], _about(lessons)),
        **features,
    }
    if modules:
        texts |= {f"api/{name}": text for name, text in site_pages.module_indexes(modules).items()}
        texts |= {f"api/{name.replace('.', '/')}.md": site_pages.module_page(name) for name in modules}
    for path in sorted(DOCS.glob("*.md")):
        text = site_notebooks.relinked(path.read_text(encoding="utf-8"), DOCS, "", modules)
        texts[path.name] = site_pages.glossary(text, lessons) if path.stem == "glossary" else text
    texts["reference.md"] = _listed("Reference", _references(texts), "What the pages above rest on.")
    top = ["notebooks/index", "ask", "results", "gallery", "features/index", "glossary", "reference"]
    titles = [f"- [{lesson.title}](notebooks/{lesson.name}.ipynb)" for lesson in lessons]
    listed = "\n".join(["", "## The notebooks", "", *titles, ""])
    texts["index.md"] = (
        (source / "index.md").read_text(encoding="utf-8")
        + listed
        + _tree([page for page in top if f"{page}.md" in texts], hidden=True)
    )
    for name, text in texts.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")


def _references(texts: Mapping[str, str]) -> list[str]:
    others = sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in (*ORDER, "glossary"))
    pages = ["power", "located", *(name for name in ORDER if f"{name}.md" in texts), *others]
    return [*pages, "api/index"] if "api/index.md" in texts else pages


def _about(lessons: Sequence[Lesson]) -> str:
    return (
        f"{len(lessons)} notebooks, one model: what is found in one is used in the next. Each can be read here, and "
        "run in "
        "Jupyter: the page links to its notebook."
    )


def _listed(title: str, pages: Sequence[str], words: str) -> str:
    return f"# {title}\n\n{words}\n{_tree(pages)}"


def _tree(pages: Sequence[str], hidden: bool = False) -> str:
    return "\n".join(["", "```{toctree}", ":maxdepth: 1", *([":hidden:"] if hidden else []), "", *pages, "```", ""])


def _sphinx(source: Path, made: Path) -> list[str]:
    """Run the builder in a process of its own; its warnings. SiteError with its last words if it fails."""
    command = [sys.executable, "-m", "sphinx", "-q", "--fresh-env", "-b", "html", "-d", str(made.parent / "trees")]
    environment = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": _path(), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [*command, str(source), str(made)], capture_output=True, text=True, encoding="utf-8", errors="replace",
        env=environment, check=False,
    )  # fmt: skip
    said = [line.replace(f"{source}/", "") for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        raise SiteError("The site was not built. The builder's last words: " + " ".join(said[-3:])[-600:])
    return said


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def summary(out: Path) -> dict[str, Any]:
    """How large a site is: pages, files, megabytes."""
    found = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in found)
    return {"pages": sum(p.suffix == ".html" for p in found), "files": len(found), "megabytes": round(size / 1e6, 1)}


def as_json(lessons: Sequence[Lesson]) -> str:
    """All findings as JSON, for those who want to count them themselves."""
    return json.dumps([{"notebook": x.name, **f} for x in lessons for f in x.findings], indent=1, ensure_ascii=False)
