"""Data sets as their makers distribute them, written as the TSV files that OFA reads.

A file a layout: each gives the files that it writes, `write` writes them, and `LAYOUTS` lists them.
"""
