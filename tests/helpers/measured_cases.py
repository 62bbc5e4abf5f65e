"""Attention calls of every kind that the sweeps measure, with few tokens."""

import torch

from fastattn.bench.case import Case
from fastattn.bench.inputs import make_inputs

CPU = torch.device("cpu")
CASES = [
    Case(20, 20),
    Case(6, 20, head_major=True),
    Case(1, 20, head_major=True),
    Case(20, 20, left=6),
    Case(20, 20, q_heads=8, kv_heads=2, sinks=True),
    Case(20, 20, q_heads=8, kv_heads=2, sinks=True, left=6),
    Case(20, 20, 3, padding=(0, 5, 12)),
    Case(30, 30, packed=(5, 1, 24)),
    Case(12, 12, 2, additive=True),
    Case(1, 20, 3, head_major=True, lengths=(20, 1, 7)),
    Case(20, 20, softcap=0.7),
]
IDS = [case.label() for case in CASES]


def inputs_of(case, count=1):
    return make_inputs(case, CPU, torch.Generator().manual_seed(1), count)


def seen(case):
    """Which keys a query sees, by what the case says in words: bool [B, Sq, Skv]."""
    found = torch.zeros(case.batch, case.q_len, case.kv_len, dtype=torch.bool)
    ends = [sum((case.packed or ())[: n + 1]) for n in range(len(case.packed or ()))]
    for b in range(case.batch):
        total = case.lengths[b] if case.lengths else case.kv_len
        for i in range(case.q_len):
            for j in range(total):
                place = i + total - case.q_len
                ok = j <= place and (case.left < 0 or j >= place - case.left)
                if case.padding:
                    ok = ok and j >= case.padding[b] and i >= case.padding[b]
                if case.packed:
                    ok = ok and sum(i >= end for end in ends) == sum(j >= end for end in ends)
                found[b, i, j] = ok
    return found
