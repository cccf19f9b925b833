"""tests/mutations.txt fits the code; mutations.py runs what is in it."""

from conftest import ROOT
from mutations import read_mutations


def test_mutations_are_not_stale():
    """Each break's old text stands exactly once in its file, its tests are there, its name is its own."""
    mutations = read_mutations()
    sources = {m.file: (ROOT / m.file).read_text() for m in mutations}
    stale = [f"{m.file}: {m.name}" for m in mutations if sources[m.file].count(m.old) != 1]
    assert not stale, f"tests/mutations.txt: not in the file exactly once, the text of {stale}"
    assert all(m.old and m.old != m.new and (ROOT / m.test).is_file() for m in mutations)
    assert len({(m.file, m.name) for m in mutations}) == len(mutations)
