from __future__ import annotations

import pytest

from batch_files import Files


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)
