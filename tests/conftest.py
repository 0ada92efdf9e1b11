"""One torch thread for a test process, the same examples every time, and a fixed seed for every test."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("house", derandomize=True, max_examples=25, deadline=None, database=None)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
