"""Measurements of a language model's quality, dense and switched: `flashsfa eval`.

`subject` loads the model under test and switches it; `perplexity`, `needle` (with the tasks of `haystack`) and `harness`
(lm-eval's tasks) measure it; `results` keeps the figures; `command` ties them to the command line.
"""
