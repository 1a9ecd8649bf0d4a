"""Fixtures every test file shares."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # models here are tiny: threads would only wait for each other


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rows, tokenizers and a small checkpoint; `$IA2MINI_DATA` or ../shared/data beside the clone."""
    folder = Path(os.environ.get("IA2MINI_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set IA2MINI_DATA to its folder")
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
