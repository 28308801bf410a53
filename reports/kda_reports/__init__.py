"""Reports on conformance runs, made from rows alone: this package reads JSON lines and imports no other of ours."""
