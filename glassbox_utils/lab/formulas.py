"""Formulas of the site as MathML, which browsers draw by themselves: no MathJax, no request, nothing to wait for.

A Sphinx extension (``docs/site/conf.py`` names it). A formula that can't be converted stays as the text that was typed.
"""

import html
from typing import Any


def mathml(tex: str, block: bool = False) -> str:
    """A LaTeX formula as MathML, its source as the name that a screen reader says."""
    from latex2mathml.converter import convert

    try:
        drawn = convert(tex, display="block" if block else "inline")
    except Exception:  # whatever a typo makes of the converter, the reader sees what was typed
        return f"<code>{html.escape(tex)}</code>"
    return drawn.replace("<math ", f'<math aria-label="{html.escape(tex, quote=True)}" ', 1)


def _inline(writer: Any, node: Any) -> None:
    from docutils import nodes

    writer.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer: Any, node: Any) -> None:
    from docutils import nodes

    name = node.get("number")
    number = f'<span class="eqno">({name})</span>' if name else ""
    writer.body.append(f'<div class="math">{number}{mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
