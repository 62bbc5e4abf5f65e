"""The list of calls: what is in it, and that each call is a right one."""

import pytest
import torch
from naive import attention

from fastattn.bench.users import contenders, truth, worker
from fastattn.bench.users.calls import Row
from fastattn.bench.users.rows import BY_NAME, ROWS, chosen
from fastattn.validation import Arguments, validated

CPU = torch.device("cpu")
IDS = [row.name for row in ROWS]


def test_the_list_is_long_and_its_names_are_unique():
    assert len(ROWS) >= 40 and len(BY_NAME) == len(ROWS)


def test_everybody_is_in_the_list():
    """The kinds of users that the table promises."""
    assert {row.sizes[3] for row in ROWS if row.who == "LLM prefill"} >= {64, 100, 2048, 2049, 8192, 32768}
    assert {(row.sizes[5], row.sizes[6]) for row in ROWS} >= {
        *((n, n) for n in (64, 80, 96, 128, 256, 512)), (192, 128), (576, 512)
    }  # fmt: skip
    for rows in (ROWS, [row for row in ROWS if row.training]):
        assert {row.group for row in rows} >= {1, 4, 32}
        assert {row.dtype for row in rows} == {torch.bfloat16, torch.float16, torch.float32}
        assert any(row.sinks for row in rows) and any(row.softcap for row in rows) and any(row.window for row in rows)
        assert any(row.packed for row in rows) and any(row.left_padded for row in rows)
        assert any(row.as_mask for row in rows) and {row.mask.__name__ for row in rows if row.mask} >= {
            "alibi", "bias", "causal_bool", "prefix"
        }  # fmt: skip
    names = " ".join(IDS)
    assert all(word in names for word in ("ViT", "SAM", "Swin", "BERT", "Whisper", "T5", "ALiBi", "SDXL"))
    assert all(word in names for word in ("Flux", "video", "MLA", "decode", "prefix"))
    assert any(row.mask_gradient for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_each_call_is_valid(row):
    batch, heads, kv_heads, q_len, kv_len, dim, value_dim = row.sizes
    assert min(row.sizes) > 0 and heads % kv_heads == 0 and row.packed < q_len
    assert not (row.packed or row.left_padded or row.mask) or q_len == kv_len
    assert sum(map(bool, (row.packed, row.left_padded, row.mask, row.lengths))) <= 1
    small = row.reduced()
    x = small.tensors(CPU)[0]
    call = validated(Arguments(x.q, x.k, x.v, **small.ours(x)), None)
    assert call.q.dtype == row.dtype and call.q.shape[3] == dim and call.v.shape[3] == value_dim
    assert (batch > 1) == (call.q.shape[0] > 1)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_each_call_is_right_at_a_reduced_size(row):
    """fastattn and torch against the truth, and the truth against attention written down by somebody else."""
    row = row.reduced()
    x = row.tensors(CPU)[0]
    found = worker.checked(row, ["fastattn", "torch", "torch-plain"], CPU)
    assert "failed" not in found["fastattn"] and "refused" not in found["fastattn"], found
    assert found["fastattn"]["error"] <= truth.LIMITS[row.dtype][0]
    others = [name for name in ("torch", "torch-plain") if "error" in found[name] and "failed" not in found[name]]
    assert len(others) == 1, found
    (want, *_) = truth.truth(row, x)
    options = row.ours(x)
    options.pop("return_lse", None)
    naive = attention(x.q.double(), x.k.double(), x.v.double(), **options)
    naive = naive[0] if isinstance(naive, tuple) else naive
    torch.testing.assert_close(want, naive.detach().double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["train left-padded 4x2048", "train T5 bias B8 512", "train sinks 2048"])
def test_the_truth_in_pieces_is_the_truth(name, monkeypatch):
    row = BY_NAME[name].reduced()
    x = row.tensors(CPU)[0]
    whole = truth.truth(row, x)
    monkeypatch.setattr(truth, "MOST_BYTES", 1)
    pieces = truth.truth(row, x)
    assert len(whole) == (5 if row.mask_gradient else 4)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_wrong_result_is_found(monkeypatch):
    """Of the output, of a gradient alone, and NaN."""
    row = BY_NAME["train MQA 2048"].reduced()
    right = contenders.bind

    def wrong(which, value):
        def bind(name, row, x):
            def call():
                found = [t.clone() for t in right(name, row, x)()]
                found[which][0, 0, 5] = value
                return tuple(found)

            return call

        return bind

    assert "failed" not in worker.checked(row, ["fastattn"], CPU)["fastattn"]
    for which, value in ((0, 3.0), (2, 3.0), (0, torch.nan), (3, torch.nan)):
        monkeypatch.setattr(contenders, "bind", wrong(which, value))
        assert worker.checked(row, ["fastattn"], CPU)["fastattn"]["failed"].startswith("wrong result")


def test_tensors_are_the_same_each_time_and_differ_from_set_to_set():
    row = BY_NAME["train sinks 2048"].reduced()
    (a, b), (c, d) = row.tensors(CPU, 2), row.tensors(CPU, 2)
    assert torch.equal(a.q, c.q) and torch.equal(b.k, d.k) and torch.equal(a.grad_out, c.grad_out)
    assert not torch.equal(a.q, b.q) and a.sinks is b.sinks


def test_layouts():
    decode, mla = BY_NAME["decode B8 8192"].reduced(), BY_NAME["MLA absorbed B1 4096"].reduced()
    assert decode.tensors(CPU)[0].k.is_contiguous()
    x = mla.tensors(CPU)[0]
    assert x.v.data_ptr() == x.k.data_ptr() and x.v.shape[-1] == 512
    assert BY_NAME["Flux 4608"].reduced().tensors(CPU)[0].q.transpose(1, 2).is_contiguous()


def test_words_choose_rows():
    assert [row.name for row in chosen(["T5", "Flux"])] == [
        "Flux 4608", "T5 bias B8 512", "train Flux 4608", "train T5 bias B8 512"
    ]  # fmt: skip
    assert chosen([]) == ROWS
    with pytest.raises(ValueError, match=r"ROW: .*'nothing'"):
        chosen(["nothing"])


def test_reduced_rows_keep_what_they_are():
    for row in ROWS:
        small = row.reduced()
        assert (small.group > 1) == (row.group > 1) and small.sizes[5:] == row.sizes[5:]
        assert (small.sizes[3] == small.sizes[4]) == (row.sizes[3] == row.sizes[4])
        assert max(small.sizes[3:5]) <= 48 and small.sizes[0] <= 2 and small.sizes[3] >= 1
        if row.window:
            assert 0 < small.window[0] < small.sizes[4] - 1


def test_what_torch_is_given():
    def theirs(**more):
        row = Row("a", "b", more.pop("sizes", (2, 2, 1, 3, 3, 4, 4)), **more)
        return row.theirs(row.tensors(CPU)[0])

    assert theirs() == {} and theirs(causal=True) == {"is_causal": True}
    assert theirs(sinks=True) is None and theirs(softcap=3.0) is None and theirs(return_lse=True) is None
    assert theirs(causal=True, sizes=(1, 1, 1, 1, 9, 4, 4)) == {}
    lower_right = theirs(causal=True, sizes=(1, 1, 1, 2, 3, 4, 4))["attn_mask"]
    assert lower_right.tolist() == [[[[True, True, False], [True, True, True]]]]
    assert theirs(lengths=True)["attn_mask"].tolist() == [[[[True, False, False]]], [[[True, True, True]]]]
    assert theirs(window=(1, 0))["attn_mask"][0, 0].tolist() == [
        [True, False, False], [True, True, False], [False, True, True]
    ]  # fmt: skip
