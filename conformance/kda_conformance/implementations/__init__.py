"""Implementations the suite can name without help: the project's own torch forms and peers that may be installed."""
