"""Backends of the operator, one module each; `dispatch` chooses among them."""
