"""Pages are Markdown with holes; `python -m benchmarks.pages` fills them from committed results.

===========  =============================================================================
`sources/`   the pages as they are written, at their paths in the repository
`render`     a source becomes a page: Jinja2, where a hole that does not resolve is an error
`tables`     Markdown tables, and numbers as text
`figures`    colours, the style, files of figures
`tutorial`   the run of the tutorial, and its notebook
===========  =============================================================================

What a hole can say is in the module `holes` of each benchmark: `HOLES`, names to functions and
values, and `FIGURES`, names to functions that draw. No sentence of a page stands in a .py file.
"""
