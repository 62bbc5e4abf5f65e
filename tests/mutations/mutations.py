"""Deliberate mistakes, each with the tests that have to notice it. What they are applied to is a copy: `run.py`."""

from __future__ import annotations

import cudnn_mutations
import dispatch_mutations
import integrations_mutations
import kernels_mutations
import models_mutations

MUTATIONS = (
    *dispatch_mutations.MUTATIONS,
    *kernels_mutations.MUTATIONS,
    *cudnn_mutations.MUTATIONS,
    *integrations_mutations.MUTATIONS,
    *models_mutations.MUTATIONS,
)
