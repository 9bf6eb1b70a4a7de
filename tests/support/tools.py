"""Programs beside Python that some tests need and the machine may not have."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

__all__ = ["find", "missing"]

STRICT = os.environ.get("MSR_TEST_STRICT") == "1"
"""Whether what is missing is a failure, as in `.ci/run`; read before the environment is cleaned."""


def missing(sentence: str) -> NoReturn:
    """End the test, which cannot run here: skipped with a sentence that says what to install."""
    if STRICT:
        pytest.fail(sentence, pytrace=False)
    pytest.skip(sentence)


def find(program: str, package: str) -> str:
    """The path of a program of the system, where administrators' programs are as well."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    return path or missing(f"{program} is not here: install the package {package}")
