"""The conformance suite of Kimi Delta Attention: laws that any implementation can be run against.

Reading order: ``implementation.py`` (what is judged), ``claims.py`` (what it promises), ``cases.py`` (what it is
run on), ``arithmetic.py``, ``ensemble.py``, ``budget.py`` and ``judge.py`` (how right is decided), then one law in ``suite/``.
"""

__version__ = "0.1.0"
