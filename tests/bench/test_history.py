"""What ``bench/history.jsonl`` tells of a changed table."""

import json

from bench import history, kernels


def test_changes():
    old = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 5.0}, "gone": {"x": 1.0}}
    new = {"a": {"x": 1.0, "y": 3.0}, "b": {"x": 5.0}, "new": {"x": 4.0}}
    assert history.changes(old, new) == {
        "lines": {"changed": 1, "added": 1, "removed": 1},
        "sums": {"x": [7.0, 10.0], "y": [2.0, 3.0]},
        "changed": {"a": {"y": [2.0, 3.0]}},
        "added": {"new": {"x": 4.0}},
        "removed": ["gone"],
    }
    assert history.changes(old, old) == {}


def test_of_many_lines_the_worst_are_told():
    old = {str(i): {"x": 100} for i in range(100)}
    new = {str(i): {"x": 101 + i} for i in range(100)}
    found = history.changes(old, new)
    assert found["lines"]["changed"] == 100
    assert list(found["changed"]) == [str(i) for i in range(99, 99 - history.MANY, -1)]


def test_a_table_has_one_line_for_a_commit(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    commits = iter(["one", "one", "two", "two"])
    monkeypatch.setattr(history.machine, "first_line", lambda *command: next(commits))
    for figure in (2, 3, 4, 1):  # the last is what the commit has
        history.record(kernels.TABLE, {"a": {"x": 1}}, {"a": {"x": figure}}, {"v": "1"}, path)
    (entry,) = map(json.loads, path.read_text().splitlines())
    assert entry["table"] == "bench/kernels.txt"
    assert entry["parent"] == "one"
    assert entry["changed"] == {"a": {"x": [1, 3]}}
    assert entry["versions"] == {"v": "1"}


def test_the_committed_files_can_be_read():
    lines = kernels.TABLE.read_text().splitlines()
    assert len(kernels.figures(lines)) == len(lines) - 1
    assert list(kernels.versions(lines)) == ["triton"]
    for line in history.PATH.read_text().splitlines():
        assert {"date", "parent", "table", "versions", "lines", "sums"} <= json.loads(line).keys()
