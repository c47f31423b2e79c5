"""Tests of the Triton kernels need a GPU or Triton's interpreter."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    skip = pytest.mark.skip(reason="on a CPU these run under TRITON_INTERPRET=1")
    for item in items:
        if item.get_closest_marker("triton"):
            item.add_marker(skip)
