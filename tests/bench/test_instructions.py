"""Counted instructions and allocations are those of ``bench/instructions.txt``."""

import pytest

from bench import instructions, native
from bench.contenders import UnavailableError
from bench.instructions import ALL, FEW, HOST, INSTRUCTIONS, KERNELS, Table


@pytest.fixture(scope="module", params=[FEW, pytest.param(ALL, marks=pytest.mark.full)])
def counted(request):
    """Which lines are counted, and the tables, by title."""
    try:
        instructions.versions()
        native.load("callgrind.c")
    except UnavailableError as reason:
        pytest.skip(str(reason))
    tables = instructions.measured(request.param)
    return request.param, {table.title: table for table in tables}


@pytest.mark.parametrize("title", [HOST, KERNELS])
def test_figures_are_those_of_the_table(counted, title):
    which, tables = counted
    old = instructions.parse(instructions.TABLES.read_text())[title]
    if others := instructions.other_versions(old, tables[title]):
        pytest.skip("; ".join(others))
    found = instructions.wrong(old, tables[title], which == ALL)
    assert not found, "\n".join(["", *found])


def test_a_step_allocates_nothing_per_tensor(counted):
    """With kept and with fresh gradients, whatever the versions."""
    lines = counted[1][HOST].lines
    ours = {name: line["malloc/tensor"] for name, line in lines.items() if "torch" not in name}
    assert ours
    assert not any(ours.values()), ours


def table(**figures):
    return Table(HOST, {"python": "3.11"}, {"a line": figures})


def test_a_table_is_read_as_it_was_written():
    columns = instructions.COLUMNS[HOST]
    made = table(**dict(zip(columns, (5000, 100000, 0.25, 3, 1.88, 20, 0, 16, 0, 2), strict=True)))
    del made.lines["a line"][columns[-1]]
    assert instructions.parse(str(made)) == {HOST: made}


def test_what_is_off_by_more_than_the_tolerance():
    per_tensor = f"{INSTRUCTIONS}/tensor"
    old, more = table(**{per_tensor: 1000}), table(**{per_tensor: 2000})
    assert not instructions.wrong(old, old)
    (message,) = instructions.wrong(old, more)
    assert "1000 -> 2000" in message
    assert instructions.settled(old, more) == more
    assert instructions.settled(old, table(**{per_tensor: 1001})) == old
    assert instructions.wrong(old, Table(HOST, old.versions))
    assert instructions.wrong(None, old)
    assert instructions.wrong(old, Table(HOST, {"python": "3.12"}, old.lines))
