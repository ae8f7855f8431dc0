"""What the tests of broken checkpoints share."""

from __future__ import annotations

import pytest

from tokenpacker.checkpoints import convert, load_released


@pytest.fixture
def refused(tmp_path):
    """Tries to convert and to load; gives the message, and sees that nothing was left behind."""

    def convert_and_load(src, **options) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(ValueError, match=r"\w") as error:
            convert(src, tmp_path / "converted", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        with pytest.raises(ValueError, match=r"\w") as same:
            load_released(src, **options)
        assert str(same.value) == str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    return convert_and_load
