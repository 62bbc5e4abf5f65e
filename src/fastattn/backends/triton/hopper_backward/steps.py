"""A consumer's way through the steps of its program in the Hopper backward: a tile of queries of a head each.

Upwards through the tiles of one head, then of the next; with ORDERED downwards through the tiles, all heads of each:
see `order.py`.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .masking import is_biased


@gluon.jit
def first_step(first, end, b, head, key, shape, cfg):
    """Of the first step: the tile m of queries, and its number among all heads' tiles; with BIASED where the bias of
    `key` is. And what stays: how many steps there are; with ORDERED where the numbers of the program's heads end; with
    BIASED not 0 where biases say more than the bounds."""
    m = first
    tile = (b * shape.heads + head) * shape.tiles + first
    steps = gl.maximum(end - first, 0) * shape.share
    bias_at = 0
    end_of_heads = 0
    biased = 0
    if cfg.ORDERED:
        m = end - 1
        tile += end - 1 - first
        after = b * shape.heads + head + shape.share  # the program's last head
        end_of_heads = after * shape.tiles
    if cfg.BIASED:
        biased = is_biased(first, b, shape)
        bias_at = b * shape.bias_b + head * shape.bias_h + key
    return m, tile, bias_at, steps, end_of_heads, biased


@gluon.jit
def next_step(m, tile, bias_at, first, end, end_of_heads, shape, cfg):
    """m, tile and bias_at of the step that follows."""
    if cfg.ORDERED:
        tile += shape.tiles
        if cfg.BIASED:
            bias_at += shape.bias_h
        if tile >= end_of_heads:  # on to the tile before
            m -= 1
            tile -= shape.share * shape.tiles + 1
            if cfg.BIASED:
                bias_at -= shape.share * shape.bias_h
    else:
        m += 1
        tile += 1
        if m == end:  # on to the next head
            m = first
            tile += shape.tiles - (end - first)
            if cfg.BIASED:
                bias_at += shape.bias_h
    return m, tile, bias_at
