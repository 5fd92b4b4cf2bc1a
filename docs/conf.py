"""The book: `make docs` writes docs/_build/html. No network is needed, and a warning is an error.

The source folder is the whole repository, so that links between pages, notebooks and figures are
the same here and on a code-hosting site; only docs/ and notebooks/ are read.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import mmkit  # noqa: E402

project, author = "mmkit", "mmkit contributors"
version = release = mmkit.__version__
copyright = f"{author}, MIT licence; images: OpenMoji, CC BY-SA 4.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "extensions.api",
    "extensions.mathml",
    "extensions.measured",
    "extensions.settings",
]
root_doc = "docs/index"
smartquotes_action = "D"  # -- becomes a dash; quotes stay as they are
include_patterns = ["docs/**", "notebooks/**"]
exclude_patterns = ["docs/_build", "**/.ipynb_checkpoints", "notebooks/runs"]
exclude_patterns += [p.name for p in ROOT.iterdir() if p.name not in ("docs", "notebooks")]

# -- Markdown and notebooks: outputs are the committed ones, nothing is run ------------------

nb_execution_mode = "off"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# -- Docstrings ------------------------------------------------------------------------------

default_role = "py:name"  # `code` in a docstring
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 90
add_module_names = False

nitpicky = True
nitpick_ignore_regex = [
    ("py:name", ".*"),  # a link only where it is a documented name
    # types within the package that users do not meet
    ("py:class", r"mmkit\..*\.(ImageStore|CorrectCaptions|Refused)"),
    # types that other packages document
    ("py:(class|exc|data|obj)", r"(?!mmkit).*"),
]

# -- Pages -----------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "mmkit"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = True
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navigation_with_keys": False,
    "navbar_persistent": [],  # the search field is in the sidebar
}
copybutton_exclude = ".linenos, .gp, .go"


def setup(app):
    """Write the page that leads from the output folder to the first page."""

    def first_page(app, error):
        if error is None and app.builder.format == "html":
            to = f"{root_doc}.html"
            page = f'<!doctype html><meta http-equiv="refresh" content="0; url={to}">'
            Path(app.outdir, "index.html").write_text(f'{page}<a href="{to}">mmkit</a>\n')

    app.connect("build-finished", first_page)
