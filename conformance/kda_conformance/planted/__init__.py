"""Planted bugs: what the suite must catch, and correct implementations of different make that it must pass.

``specimen`` is one correct implementation, ``decode_specimen`` one with a step of decoding; ``catalogue/*.toml`` are edits of their text,
each a bug with its trigger and source;
``variants.toml`` are edits that leave it correct. ``bugs`` makes functions of them, ``matrix`` runs the suite over all.
"""
