"""Some hundred cases of fuzz.py, with the seed that it has by itself."""

import fuzz


def test_spoilt_input(capsys):
    """`python tests/fuzz.py --n 20000 --seed 1` looks further."""
    found = fuzz.main(["--n", "500"])
    assert found == 0, capsys.readouterr().out
