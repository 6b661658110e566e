"""CoCoOp (arXiv 2203.05557): CoOp's context, shifted by what each picture shows, so that it serves classes
that it was not trained on.

`v_m(x) = v_m + h(x)` with h of two small layers on the picture's embedding (`models.prompts`). A batch has a
prompt for each picture and class; they go through the text tower together, in chunks of
--prompts-at-once, so memory does not grow with the batch.
"""

from __future__ import annotations

from training.objectives.coop import CoOp
from training.objectives.settings.cocoop import CoCoOpSettings


class CoCoOp(CoOp):
    """See the module."""

    settings = CoCoOpSettings
    conditioned = True


OBJECTIVE = CoCoOp()
