"""The page of `ofa_jax.demo`: what its tabs do, what it says, how it looks and how it is served.

`asking` (OFA) and `comparing` (Chinese-CLIP, with the pictures of a `library`) are plain functions
of a model and of what a person gave; `layout` makes tabs of them, `server` serves these.
"""
