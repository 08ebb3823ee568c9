"""Pages from template files: jinja2, with every text escaped, and a name that is not there as an error.

The markup and the looks stand in ``templates/*.html`` of the room that shows them, for a designer to open and edit.
"""

import functools
from pathlib import Path
from typing import Any

import jinja2


@functools.cache
def _environment(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: Path, **context: Any) -> str:
    """The template file filled in. What is markup already must be marked so, in the template (``|safe``)."""
    return _environment(template.parent).get_template(template.name).render(context)
