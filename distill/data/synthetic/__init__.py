"""Labelled images of four domains, drawn on this machine: natural, ocr, chart and multidisciplinary."""

from distill.data.synthetic.writer import synthesize

__all__ = ["synthesize"]
