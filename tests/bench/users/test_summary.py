"""What the list of calls came to, in numbers."""

import pytest

from fastattn.bench.users import summary


def entry(us=None, eager=None, **more):
    found = {} if us is None else {"us": us}
    return found | ({} if eager is None else {"eager": {"us": eager}, "host": {"us": 1.0}}) | more


def row(**contenders):
    found = {"who": "x", "contenders": {name.replace("_", "-"): value for name, value in contenders.items()}}
    return found | summary.ratios(found)


def test_the_ratio_is_to_the_quickest_peer_that_is_right():
    found = row(
        fastattn=entry(12.0, 50.0),
        fastattn_dynamic=entry(1.0, 1.0),
        torch=entry(10.0, 100.0),
        flex=entry(20.0, 40.0),
        xformers=entry(1.0, 1.0, failed="wrong result: NaN"),
        flashinfer=entry(refused="no"),
    )
    assert (found["best_peer"], found["ratio"]) == ("torch", 1.2)
    assert (found["best_peer_eager"], found["eager_ratio"]) == ("flex", 1.25)


def test_no_ratio_without_a_peer_or_without_us():
    assert row(fastattn=entry(3.0))["ratio"] is None
    assert row(torch=entry(3.0))["ratio"] is None
    assert row(fastattn=entry(3.0, failed="wrong"), torch=entry(3.0))["ratio"] is None


def test_the_sentence():
    rows = {
        "best": row(fastattn=entry(8.0, 30.0), torch=entry(10.0, 10.0)),
        "near": row(fastattn=entry(10.2, 10.0), torch=entry(10.0, 10.0)),
        "over": row(fastattn=entry(10.3, 10.0), torch=entry(10.0, 10.0)),
        "worst": row(fastattn=entry(15.0, 10.0), torch=entry(10.0, 10.0)),
        "alone": row(fastattn=entry(15.0, 10.0)),
        "wrong": row(fastattn=entry(1.0, 1.0, failed="wrong result"), torch=entry(10.0, 10.0)),
        "refused": row(fastattn=entry(refused="no"), torch=entry(10.0, 10.0)),
        "cut": {"who": "x", "contenders": {}, "failed": "no end after 9 s"},
        "not yet": {"who": "x", "contenders": {}},
        "late": {"who": "x", "contenders": {}, "left_out": "no time"},
    }
    found = summary.of(rows)
    assert (found["rows"], found["failed"]) == (8, 3)
    assert found["captured"] == {"timed": 5, "alone": 1, "near": 3, "worst": {"row": "worst", "ratio": 1.5}}
    assert found["eager"] == {"timed": 5, "alone": 1, "near": 4, "worst": {"row": "best", "ratio": 3.0}}
    assert summary.sentence(found) == (
        "8 rows; captured: best or within 2% in 3 of 5 (1 without a peer), worst 1.50 (worst); "
        "eager: best or within 2% in 4 of 5 (1 without a peer), worst 3.00 (best); 3 failed"
    )


def test_the_sentence_of_nothing():
    assert summary.sentence(summary.of({})) == "0 rows; 0 failed"


def test_a_line_ends_with_the_ratios():
    found = row(fastattn=entry(1234.0, 30.04, error=2e-3), torch=entry(1.234, 10.0, failed="OutOfMemoryError: no"))
    assert summary.line("x", found).split("  ")[-1].strip() == (
        "fastattn 1234/30.0/1.00 (2e-03), torch OutOfMemoryError: no"
    )
    found = row(fastattn=entry(12.0, 30.0, error=1e-3, gradient_error=2e-3), torch=entry(10.0, 10.0, error=0.0))
    assert summary.line("x", found).endswith("(2e-03), torch 10.0/10.0/1.00 (0e+00): captured 1.20, eager 3.00")
    assert summary.line("x", {"failed": "why", "contenders": {}}).endswith("failed: why")


@pytest.mark.parametrize("us, text", [(0.1234, "0.12"), (12.34, "12.3"), (1234.5, "1234")])
def test_numbers(us, text):
    assert summary.number(us) == text
