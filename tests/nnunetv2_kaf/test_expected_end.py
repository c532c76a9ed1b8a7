from datetime import datetime

import pytest

from nnunetv2_kaf.expected_end import expected_end

NOW = datetime(2026, 11, 26, 23, 30)


@pytest.mark.parametrize(
    ("seconds", "left", "text"),
    [
        ([60.0], 90, "2026-11-27 01:00 (1:30 h left, 60 s an epoch)"),
        ([500.0, 60.0, 60.0], 10, "2026-11-26 23:40 (0:10 h left, 60 s an epoch)"),  # the slow first epoch
        ([100.0] * 20 + [60.0] * 10, 1, "2026-11-26 23:31 (0:01 h left, 60 s an epoch)"),  # the machine is free again
    ],
)
def test_the_recent_epochs_decide(seconds: list[float], left: int, text: str) -> None:
    assert expected_end(seconds, left, NOW) == text
