"""What may come onto this disk, depending on whose wish it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from meshnode.models.store.slice import Slice


class Bounds(Protocol):
    """Of one pull. Called in threads or in trio's; the first two may block for the disk."""

    def check_beginning(self, header_bytes: int) -> None:
        """Whether another model may begin, with so large a header. Raises `ResourceError`."""

    def check_room(self, part: Slice, missing_bytes: int) -> None:
        """Whether so many bytes more may come into the slice. Raises `ResourceError`."""

    def note_begun(self, part: Slice, is_users: Callable[[], bool]) -> None:
        """A slice was made for this pull; it holds nothing yet. is_users: whether this node's own
        user wants it too by now."""


class NoBounds:
    """For this node's own user: the disk's own bound is enough."""

    def check_beginning(self, header_bytes: int) -> None:
        pass

    def check_room(self, part: Slice, missing_bytes: int) -> None:
        pass

    def note_begun(self, part: Slice, is_users: Callable[[], bool]) -> None:
        pass


NO_BOUNDS = NoBounds()
