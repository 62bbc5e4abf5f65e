"""Which calls of split keys are one launch: the last program of a tile to be done combines what all of them left.

A launch less spares the host one of two. The GPU takes about as long where rows and splits are few; where they are many
the combine kernel is quicker: there many programs read a part each, here one reads all.
"""

from __future__ import annotations

from ....call import Problem
from .launch_config import Launch, block_of
from .shapes import is_wide, rows

#: Numbers of the output that the last program reads at a time: 16 or 32 registers a thread of four warps. With 32 the
#: binary of a plain call takes 156 registers instead of 128 on 8.0; on 9.0, where a program mostly has an SM to itself,
#: 168 instead of 141.
AT_ONCE, AT_ONCE_ALONE = 2048, 4096
LEAST_ROWS, MOST_ROWS = 4, 16  #: rows of these; between them as many as a group has heads
MOST_ROUNDS = 4  #: times that it reads as many, one after another, up to which it is the one that combines


def counts(p: Problem, launch: Launch, large: bool) -> bool:
    """Whether there is another binary, that counts the programs that are done and combines. large: as the kernel's
    `LARGE`, whose products the assembler orders by what comes after them.

    (Wide heads have none: 128 splits of 8 rows of 512 numbers leave 2 MiB, for one multiprocessor to read. Follows
    from what picks the binary anyway; not from lengths or the batch.)
    """
    return launch.splits > 1 and not (launch.near or large or is_wide(p))


def combines(p: Problem, launch: Launch) -> bool:
    """Whether the last program combines, where nothing forbids it: as long as that is a few rounds."""
    at_once, _, splits = steps(p)
    rounds = -(-rows(p) // at_once) * -(-launch.splits // splits)
    return rounds <= MOST_ROUNDS


def steps(p: Problem) -> tuple[int, int, int]:
    """Rows, columns and splits that it reads at a time, powers of two."""
    at_once = min(MOST_ROWS, max(LEAST_ROWS, 1 << (p.group - 1).bit_length()))
    columns = block_of(p.value_dim)
    most = AT_ONCE_ALONE if p.capability[0] in (9, 10) else AT_ONCE
    return at_once, columns, max(1, most // (at_once * columns))
