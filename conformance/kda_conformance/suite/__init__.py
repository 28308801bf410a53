"""The laws. Run them with ``pytest --pyargs kda_conformance.suite --impl NAME``, or import them into a test module of your own.

A law is a test function marked ``law(name)``. It receives the ``subject`` on trial and a ``call`` (a case in an input dtype), or a
``dtype``.
"""
