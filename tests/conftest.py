"""Options of the test run."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--update-formulas", action="store_true", help="rewrite formulas/ with what is generated now")
