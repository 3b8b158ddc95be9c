"""Measurements of a language model's quality."""
