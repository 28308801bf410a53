"""Reports: from rows (JSONL) to pages, without running anything.

Reading order: ``rows.py`` (what a run left behind), ``errors.py`` and ``envelopes.py`` (what it adds up to),
``charts.py`` and ``page.py`` (how it is drawn). Measuring is somebody else's work: this package imports no other
package of the suite.
"""
