"""Plain pipeline parallelism: the root travels alone. The reference for text and for speed."""

from __future__ import annotations

from collections.abc import Sequence as Many

from fullpipe.methods.base import Chosen, Load, Method, root_if_new
from fullpipe.sequences.sequence import Sequence


class PlainPipeline(Method):
    """With several sequences on n stages every flight carries its share of the roots, running / n rounded up, of those
    that have waited longest. Without that sequences that once landed together would stay together for ever, and the
    pipeline would carry one crowded flight. It is what pipeline-parallel servers do with microbatches.
    """

    name = "pp"
    needs_draft = False

    def launch(self, sequences: Many[Sequence], load: Load) -> Chosen:
        roots = [(one, nodes) for one in sequences if (nodes := root_if_new(one.tree))]
        if self.machine is None or len(roots) < 2:
            return roots
        roots.sort(key=lambda chosen: (chosen[0].waiting_since, chosen[0].request.id))
        return roots[: -(-load.running // self.machine.num_stages)]

    def expand(self, sequences: Many[Sequence], load: Load) -> Chosen:
        return []
