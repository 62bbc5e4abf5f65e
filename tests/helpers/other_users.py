"""Files of other users of the machine, for tests that run as root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

MALLORY, ALICE = 61001, 61002  #: users without an entry anywhere

as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be several users: not tried here"
)


@contextmanager
def user(uid: int) -> Iterator[None]:
    """Within the block this process opens, makes and removes files as another user."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
