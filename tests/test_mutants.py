"""The table of `make mutants` fits the code: every line is there once, every break is Python, every test has a name."""

from mutants import MUTANTS, misfits


def test_every_line_that_mutants_breaks_is_there():
    assert sum(map(len, MUTANTS.values())) == 83 and misfits() == []
