"""What the bench says of two tables."""

from __future__ import annotations

import sys

import pytest

from experiments.bench.__main__ import main, save


def written(path, ratios, **about):
    found = [
        {"id": row_id, "what": what, "over": "x", "ratio": ratio, "q1": low, "q3": high, "good": good}
        for row_id, what, good, ratio, low, high in ratios
    ]
    save(path, found, {"device": "here", "threads": 2, "cores": 2, "torch": "2.15", "overrides": "none"} | about)
    return str(path)


def test_compare_says_what_changed(tmp_path, monkeypatch, capsys):
    a = written(
        tmp_path / "a.csv",
        [
            ("C1", "net", ">= 3", 2.0, 1.9, 2.1),
            ("C5", "slower", "lower", 2.0, 1.9, 2.1),
            ("C5", "same", "lower", 1, 0.9, 1.1),
            ("b", "gone", "lower", 1, 1, 1),
        ],
    )
    b = written(
        tmp_path / "b.csv",
        [
            ("C1", "net", ">= 3", 3.0, 2.9, 3.1),
            ("C5", "slower", "lower", 3.0, 2.9, 3.1),
            ("C5", "same", "lower", 1.1, 1.05, 1.2),
        ],
    )
    monkeypatch.setattr(sys, "argv", ["bench", "compare", a, b])
    main()
    shown = capsys.readouterr()
    lines = {line.split()[1]: line.split() for line in shown.out.splitlines() if line.startswith("C")}
    assert lines["net"][-5:] == ["2.000", "3.000", "+50.0", "%", "better"]
    assert lines["slower"][-1] == "worse"
    assert lines["same"][-3:] == ["+10.0", "%", "overlap"]
    assert "1 rows only in" in shown.out
    assert "gone" not in shown.out
    assert not shown.err


def test_compare_warns_of_another_machine_and_refuses_tables_without_a_common_row(tmp_path, monkeypatch, capsys):
    a = written(tmp_path / "a.csv", [("C1", "net", "higher", 2, 2, 2)])
    b = written(tmp_path / "b.csv", [("C1", "net", "higher", 2, 2, 2)], threads=4, torch="2.16")
    c = written(tmp_path / "c.csv", [("C1", "other", "higher", 2, 2, 2)])
    monkeypatch.setattr(sys, "argv", ["bench", "compare", a, b])
    main()
    warned = capsys.readouterr().err.splitlines()
    assert warned == ["retable: warning: threads differs: 2, 4", "retable: warning: torch differs: 2.15, 2.16"]
    monkeypatch.setattr(sys, "argv", ["bench", "compare", a, c])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no row in common" in capsys.readouterr().err
