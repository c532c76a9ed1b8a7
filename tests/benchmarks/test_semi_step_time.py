import json
from pathlib import Path

import semi_step_time
from synthetic import Layout

TINY = Layout((6, 24, 20), (1.0, 1.0, 1.0), (16, 16), 2, (4, 6, 8), ((1, 1), (2, 2), (2, 2)))


def test_every_arm_is_timed_and_compared_with_the_same_trainer(tmp_path: Path, monkeypatch) -> None:
    args = semi_step_time.parser().parse_args(["--rounds", "2", "--warmup", "1", "--cases", "organ 2d"])
    monkeypatch.setitem(semi_step_time.CASES, "organ 2d", TINY)
    document = json.loads(json.dumps(semi_step_time.run(args, semi_step_time.CASES)))
    arms = document["cases"]["organ 2d"]["arms"]
    assert list(arms) == list(semi_step_time.ARMS)
    for name, arm in arms.items():
        assert arm["step_seconds"] > 0
        assert (arm["ratio"]["median"] == 1.0) == (arm["to"] == name)
    arms["kaf_semi"]["ratio"] = {"median": 2.31, "quartiles": [2.2, 2.4]}
    arms["plain_semi"]["ratio"] = {"median": 2.0, "quartiles": [1.9, 2.1]}
    text = semi_step_time.table(document)
    assert "| `kaf_semi` |" in text
    assert "2.31 (2.20 to 2.40) | missed |" in text
    assert "2.00 (1.90 to 2.10) | met |" in text
