"""The report of a comparison, as one HTML file."""

from loadtest.compare.html.page import render

__all__ = ["render"]
