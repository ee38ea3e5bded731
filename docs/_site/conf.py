"""Configuration of Sphinx for the documentation site. `build.py` copies it to the site's sources."""

from lightning_mlc import __version__

project = "lightning-mlc"
release = version = __version__
copyright = "the authors of lightning-mlc, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"lightning-mlc {version}"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["narrow.css"]
smartquotes = False  # otherwise --key becomes a dash

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_dmath_allow_space = False
# Blocks of other languages than those that are run need not be valid for a highlighter.
suppress_warnings = ["misc.highlighting_failure"]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
