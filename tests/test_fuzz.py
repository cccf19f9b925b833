"""Some hundred cases of fuzz.py, with the seed that it has by itself."""

import fuzz


def test_spoilt_input(capsys):
    """`python tests/fuzz.py --n 20000 --seed 1` looks further."""
    found = fuzz.main(["--n", "500"])
    assert found == 0, capsys.readouterr().out


def test_odd_values_are_copies(tmp_path):
    """What one case spoils further must not be odd in another way in the next, nor come to hold itself."""
    case, before = fuzz.Case(tmp_path, 0), repr(fuzz.ODD_VALUES)
    for _ in range(300):
        if isinstance(value := case.odd(), list):
            value.append(value)
        elif isinstance(value, dict):
            value["itself"] = value
    assert repr(fuzz.ODD_VALUES) == before
