"""Generating text with a model whose blocks may lie in several places."""
