from __future__ import annotations

import logging
from pathlib import Path

from pretraining.monitoring.logfile import log_file


def test_nothing_is_written_before_the_first_flush_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "pretraining.log"
    logger = logging.getLogger("pretraining.something")
    logger.setLevel(logging.INFO)
    with log_file(path) as log:
        logger.info("one")
        logger.info("two")
        assert not path.exists()
        log.flush()
        assert [line.split()[-1] for line in path.read_text().splitlines()] == ["one", "two"]
        logger.info("three")
        assert path.read_text().splitlines()[-1].endswith("INFO three")
    logger.info("after")
    with log_file(path) as log:
        logger.info("of a run that fails before it begins")
    assert len(path.read_text().splitlines()) == 3
    logger.setLevel(logging.NOTSET)
