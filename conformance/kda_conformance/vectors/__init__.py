"""Published test vectors: JSON and safetensors files that a port in any language can use without Python.

``flags.py`` says why a vector exists, ``catalogue.py`` which there are, ``parts.py`` adds what surrounds the operator, ``files.py`` is
the format, ``build.py`` writes it and ``check.py`` judges an implementation by it. The format for users: ``docs/vectors.md``.
"""
