"""A notebook on another model: what was not prepared for it is skipped in words, and prose says whose numbers it has.

Code cells carry tags ``needs:PATH``: a place in the prepared folder (``studies/clamp_choose``, ``vectors/tone``,
``loans/deployed``; ``saes`` is the main SAE of the card). Markdown cells that state what was measured on the embedded
model carry the tag ``about-embedded``.
"""

import ast
import builtins
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassbox_utils.core import assets, prepared, schema
from glassbox_utils.core.evidence import MIMETYPE
from glassbox_utils.core.models import EMBEDDED, load_model

REFUSED = "refused.json"
"""in a prepared folder: name of a study (or another thing) -> why it can't be done on this model"""
NEEDS = "needs:"
ABOUT = "about-embedded"


@dataclass(frozen=True)
class Subject:
    """The model that notebooks are run on."""

    model: str
    """what ``load_model`` takes"""
    hash: str
    folder: Path
    """where what was prepared for it lies, or would lie"""

    @property
    def name(self) -> str:
        return Path(self.model).name

    @property
    def is_embedded(self) -> bool:
        return self.hash == prepared.card(assets.DATA).model_hash

    @property
    def card(self) -> prepared.Card | None:
        """Of its prepared folder; None if nothing was prepared."""
        return prepared.card(self.folder) if (self.folder / prepared.CARD).exists() else None


def subject_of(model: str | None = None) -> Subject:
    """The subject that a name or folder stands for, loaded once for its hash; None is the embedded model.

    Raises ModelError for what can't be loaded, PreparedError for a prepared folder that is damaged.
    """
    if model in (None, EMBEDDED):
        known, mine = prepared.card(assets.DATA).model_hash, prepared.folder()
        its_own = (mine / prepared.CARD).exists() and prepared.card(mine).model_hash == known
        return Subject(EMBEDDED, known, mine.absolute() if its_own else assets.DATA)
    loaded = load_model(model, device="cpu", dtype="bfloat16")  # the hash is the same in any type and place
    where = prepared.found(loaded.hash) or prepared.models_dir() / loaded.name
    return Subject(str(model), loaded.hash, where.absolute())


# --- what is there --------------------------------------------------------------------------------------


def needs_of(cell: Any) -> list[str]:
    """Places in the prepared folder that a cell reads, by its tags."""
    return [tag.removeprefix(NEEDS) for tag in cell.metadata.get("tags", []) if tag.startswith(NEEDS)]


def has(subject: Subject, need: str) -> bool:
    """Is it in the prepared folder? ``studies/saes`` is there as a file or folder of that name, with any ending."""
    if need == "saes":
        return subject.card is not None and "main" in subject.card.saes
    place = subject.folder / need
    return place.exists() or any(p.stem == place.name for p in place.parent.glob(f"{place.name}.*"))


def refusals(folder: Path) -> dict[str, str]:
    """Why studies can't be done on the model of a prepared folder, as ``glassbox prepare`` wrote it."""
    if not (folder / REFUSED).exists():
        return {}
    advice = "the file that `glassbox prepare` writes, or delete it"
    return {_plain(k): str(v) for k, v in schema.read_mapping(folder / REFUSED, prepared.PreparedError, advice).items()}


def _plain(name: str) -> str:
    return name.replace("-", "_").removesuffix(".json")


def why_not(subject: Subject, needs: Iterable[str]) -> str:
    """In words, for the first need that is missing: the recorded reason if there is one, else the command."""
    missing = next(need for need in needs if not has(subject, need))
    known = refusals(subject.folder)
    for name in (missing, missing.split("/")[-1], missing.split("/")[0]):
        if reason := known.get(_plain(name)):
            return f"{missing} can't be made for {subject.name}: {reason.rstrip('.')}."
    return f"{missing} was not prepared for {subject.name}. `glassbox prepare {subject.model}` makes it."


# --- which names a cell reads and binds ---------------------------------------------------------------------


def names_of(source: str) -> tuple[set[str], set[str], set[str]]:
    """Names that a cell reads before it binds them itself, those that it binds, and those that it only adds to (+=).

    Bodies of functions count as read: whoever calls them needs their names. A cell that is no plain Python (``%magic``)
    has none.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return set(), set(), set()
    read, bound, grown = set[str](), set[str](), set[str]()
    for kind, name in _events(body):
        if kind == "read" and name not in bound:
            read.add(name)
        elif kind == "bind":
            bound.add(name)
        elif kind == "grow" and name not in bound:
            read.add(name)
            grown.add(name)
    return read - set(dir(builtins)), bound, grown


def _events(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, str]]:
    """("read" | "bind" | "grow", name) in the order in which Python would do it."""
    for node in nodes:
        match node:
            case ast.Name(ctx=ast.Load()):
                yield "read", node.id
            case ast.Name():
                yield "bind", node.id
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                a = node.args
                yield from _events(
                    [*a.defaults, *(d for d in a.kw_defaults if d), *getattr(node, "decorator_list", [])]
                )
                extra = [x for x in (a.vararg, a.kwarg) if x]
                inside = {x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, *extra]}
                yield from _inner(node.body if isinstance(node.body, list) else [node.body], inside)
                if not isinstance(node, ast.Lambda):
                    yield "bind", node.name
            case ast.ClassDef():
                yield from _events([*node.decorator_list, *node.bases])
                yield from _inner(node.body, set())
                yield "bind", node.name
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                parts = [x for g in node.generators for x in (g.iter, g.target, *g.ifs)]
                parts += [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
                yield from _inner(parts, set())
            case ast.Assign() | ast.AnnAssign() | ast.NamedExpr():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from _events([node.value] if node.value else [])
                yield from _events(targets)
            case ast.AugAssign():
                yield from _events([node.value])
                yield from [("grow", node.target.id)] if isinstance(node.target, ast.Name) else _events([node.target])
            case ast.For() | ast.AsyncFor():
                yield from _events([node.iter, node.target, *node.body, *node.orelse])
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    yield "bind", alias.asname or alias.name.split(".")[0]
            case ast.ExceptHandler():
                yield from _events([node.type] if node.type else [])
                yield from [("bind", node.name)] if node.name else []
                yield from _events(node.body)
            case ast.MatchAs() | ast.MatchStar():
                yield from _events(ast.iter_child_nodes(node))
                yield from [("bind", node.name)] if node.name else []
            case _:
                yield from _events(ast.iter_child_nodes(node))


def _inner(nodes: Iterable[ast.AST], known: set[str]) -> Iterator[tuple[str, str]]:
    """Reads of an inner scope that reach the outer one."""
    events = list(_events(nodes))
    local = known | {name for kind, name in events if kind != "read"}
    yield from ((kind, name) for kind, name in events if kind == "read" and name not in local)


# --- the notebook -----------------------------------------------------------------------------------------


def adapt(notebook: Any, subject: Subject) -> list[str]:
    """Change a notebook, in place, so that it runs on the subject; the sentences of what is skipped.

    A code cell whose needs are missing, or that reads a name which only a skipped cell would have made (or made anew),
    becomes one that prints why. Imports of a skipped cell stay.
    """
    skipped: list[str] = []
    defined, lost, heading = set[str](), set[str](), ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#{1,3} +(.+)$", cell.source, re.M)
            heading = found[-1] if found else heading
            if ABOUT in cell.metadata.get("tags", []) and not subject.is_embedded:
                cell.source = _noted(cell.source, subject.name)
            continue
        if cell.cell_type != "code":
            continue
        read, bound, grown = names_of(cell.source)
        needs = needs_of(cell)
        if any(not has(subject, need) for need in needs):
            reason = why_not(subject, needs)
        elif gone := sorted(read & lost):
            reason = f"it uses what was skipped ({', '.join(gone[:3])}{', ...' if len(gone) > 3 else ''})."
        else:
            defined, lost = defined | bound, lost - bound
            continue
        imports = _imports(cell.source)
        kept = names_of(imports)[1]
        lost = (lost | bound | (grown - defined)) - kept
        defined |= kept
        sentence = f"Skipped{f' ({heading})' if heading else ''}: {reason}"
        cell.source = f"{imports}print({json.dumps(sentence, ensure_ascii=False)})"
        skipped.append(sentence)
    return skipped


def _imports(source: str) -> str:
    """Import statements at the head of a cell's own level, one a line."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return ""
    return "".join(f"{ast.unparse(node)}\n" for node in body if isinstance(node, ast.Import | ast.ImportFrom))


def _noted(source: str, name: str) -> str:
    """The note stands at the head, behind the cell's own heading if it begins with one."""
    note = f"> *The sentences below were written about {EMBEDDED}. What holds for {name} stands in the cells.*"
    first, _, rest = source.partition("\n")
    return f"{first}\n\n{note}\n{rest}" if first.startswith("#") else f"{note}\n\n{source}"


def findings_of(notebook: Any) -> list[dict[str, Any]]:
    """What the ladders of an executed notebook say, as ``core.evidence`` wrote it."""
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.get("outputs", [])]
    return [dict(f) for o in outputs for f in o.get("data", {}).get(MIMETYPE, [])]
