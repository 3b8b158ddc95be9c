"""Attention of many queries over rows that are sparse or dense."""
