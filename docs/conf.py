"""Configuration of Sphinx, which builds the documentation as a site: `make docs`. GitHub shows the same pages."""

import zoo

project = "zoo"
release = zoo.__version__
copyright = "its contributors, Apache-2.0"

# The source folder is the whole repository, so that relative links work on the site and on GitHub.
include_patterns = [
    "docs/*.md",
    "docs/families/*.md",
    "docs/guides/*.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "checkpoints/README.md",
]
root_doc = "docs/index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
default_role = "literal"

html_theme = "furo"
html_title = "zoo"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
templates_path = ["."]
html_additional_pages = {"index": "start.html"}

# Text that only the site needs. It is appended to these pages, which stay free of it elsewhere.
SITE_ONLY = {
    "docs/index": """
```{toctree}
:hidden:
:caption: Guides
guides/fine-tune
guides/evaluate
guides/probes
guides/distill
guides/features
guides/coco
guides/data
guides/panoptic
guides/large-photos
guides/early-exit
guides/mm
guides/onnx
guides/python
```
```{toctree}
:hidden:
:caption: Models
:glob:
families/index
families/*
/checkpoints/README
```
```{toctree}
:hidden:
:caption: Operators
operators
```
```{toctree}
:hidden:
:caption: Development
adding
/CONTRIBUTING
/CHANGELOG
```
""",
    "docs/guides/python": """
## Reference

```{eval-rst}
.. currentmodule:: zoo.recipes
.. autofunction:: train
.. autofunction:: evaluate
.. autofunction:: predict
.. autoclass:: TrainResult()
   :members: model
.. autoclass:: EvalResult()
.. autoclass:: Prediction()
.. autoclass:: Hooks
.. autoclass:: TrainingState()
   :members: stop
.. autoexception:: UserError()
```
""",
    "docs/operators": """
## Specifications

```{eval-rst}
.. automodule:: zoo.kernels
   :members:
   :imported-members:
   :member-order: bysource
```
""",
}


def setup(app):
    """Register the hook that appends `SITE_ONLY`."""
    app.connect("source-read", add_what_only_the_site_needs)


def add_what_only_the_site_needs(app, page: str, source: list[str]) -> None:
    """Append the text of `SITE_ONLY` to `page`."""
    source[0] += SITE_ONLY.get(page, "")
