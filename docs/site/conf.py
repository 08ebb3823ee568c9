"""How Sphinx builds the site. `glassbox site` (lab/site.py) copies this folder and adds all other pages."""

from pathlib import Path

project = "Glassbox"
html_title = "Glassbox"
author = copyright = "the Glassbox authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "glassbox_utils.lab.formulas"]

nb_execution_mode = "off"  # what was computed is shown; nothing is computed here
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4
html_math_renderer = "mathml"  # no MathJax: it would come from another host
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]  # terms of the glossary are H3 for GitHub's sake

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
add_module_names = False
python_use_unqualified_type_names = True
viewcode_line_numbers = True
viewcode_follow_imported_members = False  # a source page names what its module defines, nothing else

html_theme = "pydata_sphinx_theme"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system says; a button changes it
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = html_show_sourcelink = False
html_show_search_summary = False  # it fetches pages, which a browser refuses from file://
html_search_scorer = str(Path(__file__).with_name("scorer.js"))
html_sidebars = {"index": [], "ask": [], "results": [], "gallery": [], "glossary": []}
html_theme_options = {
    "logo": {"text": "Glassbox"},
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 7,
    "search_bar_text": "Search the notebooks, terms and modules",
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "collapse_navigation": True,
    "navigation_with_keys": False,
    "show_version_warning_banner": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def setup(app):
    """A field of a NamedTuple without words of its own says nothing, instead of "Alias for field number 0"."""
    app.connect("autodoc-process-docstring", _without_aliases)


def _without_aliases(app, what, name, obj, options, lines):
    lines[:] = [line for line in lines if not line.startswith("Alias for field number")]
