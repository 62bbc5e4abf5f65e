"""Attention calls as users of all kinds make them, beside every peer that can make them: `fastattn sweep users`.

`rows.py` is the list; `calls.py` makes the tensors of a row, `truth.py` what they have to give, `contenders.py` and
`packages.py` who can do it; `worker.py` measures some rows in a process of its own, `run.py` starts the processes and
keeps what they find, `summary.py` says what came out, and `reasons.py` why a row is not the fastest.
"""
