"""The site of ``make site``: README, guide and notebooks as they are, a gallery and the reference.

The folder that Sphinx reads is the repository itself, so links between pages are those that work on a forge.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from site_pages import linkcode_resolve as linkcode_resolve

project = "lora_lens"
html_title = "lora_lens"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "matplotlib.sphinxext.plot_directive",
    "sphinx_copybutton",
    "site_pages",
]
root_doc = "README"
include_patterns = [
    "README.md",
    "docs/*.md",
    "docs/generated/*.rst",
    "notebooks/*.md",
    "notebooks/[0-9]*.ipynb",
    *(f"{folder}/README.md" for folder in ("benchmarks", "data", "examples", "findings", "tests/zoo")),
]
exclude_patterns = [".*", "results", "downloads", "lora_lens", "**/node_modules"]

# Where the pages stand in the sidebar; those that are not named here follow by their own names.
navigation = """
{toctree}
:hidden:
:caption: The course
:glob:

notebooks/README
notebooks/[0-9]*
notebooks/*

{toctree}
:hidden:
:caption: Guide
:glob:

docs/models
docs/loops
docs/texts
docs/sweeps
docs/clusters
docs/after_training
docs/continual
docs/measures
docs/explorers
docs/files
docs/*

{toctree}
:hidden:
:caption: Reference
:glob:

docs/generated/gallery
docs/generated/lora_lens
docs/generated/*

{toctree}
:hidden:
:caption: Behind it

findings/README
tests/zoo/README
benchmarks/README
data/README
examples/README
"""

# Notebooks are executed by `make site`, which keeps what has been; otherwise they are shown without outputs.
nb_execution_mode = "off"
nb_execution_timeout = 3600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_render_markdown_format = "myst"  # with tables
nb_output_stderr = "remove"  # what libraries say when they are imported
nb_ipywidgets_js = {}  # nothing is loaded from the network: of an explorer its still copy is shown
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "amsmath"]
html_math_renderer = "mathml"

# The reference
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
autosummary_generate = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature tells them
napoleon_custom_sections = ["Returns"]  # whose lines begin with words, not with a type

# The gallery
plot_include_source = True
plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("png", 120)]
plot_working_directory = str(Path(__file__).parents[1])

html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "footer_content_items": [],
}
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
html_sidebars = {"files/**": []}  # which takes most of the time of a page
html_static_path = ["site.css", "site.js"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_search_summary = False  # it would fetch pages, which a browser refuses to a page from disk
html_use_index = False  # the search finds every name
html_domain_indices = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
