"""Work beside other work, with errors that come out bare.

A trio nursery wraps every error in an ExceptionGroup. Where one piece of work is the point and the
rest only accompanies it, callers want to write `except MeshError`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from meshnode.errors import MeshError


@asynccontextmanager
async def bare_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery out of which one error comes as itself: a `MeshError` if there is one, since it
    is the one with a sentence for the user, else the first."""
    error: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except* Exception as group:
        error = leading_error(group)
    if error is not None:
        raise error


@asynccontextmanager
async def accompanied_by(*companions: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Runs `companions` while the body runs and cancels them when it is done."""
    async with bare_nursery() as nursery:
        for companion in companions:
            nursery.start_soon(companion)
        yield
        nursery.cancel_scope.cancel()


def leading_error(group: BaseExceptionGroup[BaseException]) -> Exception:
    """Of all plain errors in a group of groups, the one to tell."""
    plain = list(_plain_errors(group))
    return next((error for error in plain if isinstance(error, MeshError)), plain[0])


def _plain_errors(group: BaseExceptionGroup[BaseException]) -> list[Exception]:
    errors: list[Exception] = []
    for inner in group.exceptions:
        if isinstance(inner, BaseExceptionGroup):
            errors += _plain_errors(inner)
        elif isinstance(inner, Exception):
            errors.append(inner)
    return errors
