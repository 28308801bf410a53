"""Benchmarks for a machine without a GPU, measured by pytest-benchmark.

``pytest --pyargs kda_conformance.benchmarks --impl NAME`` judges the implementation on each workload and then times it. What is measured on
a GPU, and what is compared, is :mod:`kda_conformance.bench`.
"""
