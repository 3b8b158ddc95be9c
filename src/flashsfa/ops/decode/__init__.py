"""Attention of a few queries over cached codes."""
