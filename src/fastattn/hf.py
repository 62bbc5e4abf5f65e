"""The name "fastattn" for transformers: importing this module registers it.

The code is in `fastattn.integrations.transformers`.
"""

from __future__ import annotations

from .integrations.transformers import FastattnCache as FastattnCache
