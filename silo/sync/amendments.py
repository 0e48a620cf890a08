"""Changes of the head that are no content: they ride with the next commit, so that they cost no request of their own.

The collector raises its floor so (safety rule 17), a start puts the list of its first reads there, and a fork lets
go of a parent that it needs no longer. Whoever wants one committed at once asks the syncer for a cut: it commits even
when nothing else has changed.

Pure. One event loop; each change stands until a head has it.
"""

from __future__ import annotations

import attrs
import msgspec

from silo.sync.head import Head, PartRef
from silo.sync.layout import parse_segment_key

__all__ = ["Amendments"]


@attrs.define
class Amendments:
    """What the next head shall say beside its content."""

    gc_floor: int = 0
    """At least this."""
    hot: PartRef | None = None
    """``None``: as it is."""
    needless_parents: frozenset[str] = frozenset()
    """Keys of pins in other groups that nothing of this group needs any more."""
    wants_checkpoint: bool = False
    """The next commit shall write the changed pages of the map, whatever the planner thinks of it."""

    def applied(self, head: Head) -> Head:
        """The head with all of it; an equal one when it says all of that already."""
        return msgspec.structs.replace(
            head,
            gc_floor=max(head.gc_floor, self.gc_floor),
            hot=self.hot or head.hot,
            parents=tuple(parent for parent in head.parents if parent not in self.needless_parents),
        )

    def last_seq(self, epoch: int) -> int:
        """The highest sequence number of an epoch that it refers to, or 0."""
        name = parse_segment_key(self.hot.key) if self.hot is not None else None
        return name.seq if name is not None and name.epoch == epoch else 0

    def changes(self, head: Head) -> bool:
        """Whether there is anything to commit, or to write, for their sake."""
        return (self.wants_checkpoint and bool(head.segments)) or self.applied(head) != head
