"""Two threads and a fixed seed for every test, so that a failure repeats."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)
