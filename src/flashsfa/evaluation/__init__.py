"""Measurements of a language model's quality, dense and switched.

`subject` loads the model under test and switches it; `perplexity`, `needle` (with the tasks of `haystack`), `harness` (lm-eval's
tasks) and `memory` measure it; `results` keeps the figures; `measure` puts them together into the evaluations that
`flashsfa eval` runs.
"""

VARIANTS = {"sfa": "Sparse Feature Attention", "dense": "dense"}  # names in files: names where people read them
