import pytest

from fastattn.common.table import ratio, table


def test_table_aligns_names_left_and_numbers_right():
    assert table(["name", "n"], [["a", "1.5"], ["long name", "10.5"]]).splitlines() == [
        "name          n",
        "---------  ----",
        "a           1.5",
        "long name  10.5",
    ]


@pytest.mark.parametrize(
    "value, base, text", [(3.0, 2.0, "1.50x"), (None, 2.0, "-"), (3.0, None, "-"), (3.0, 0.0, "-")]
)
def test_ratio(value, base, text):
    assert ratio(value, base) == text
