"""Digests tell how far they are, file after file."""

from __future__ import annotations

import trio
import trio.testing

from meshnode.models.shelf import PROGRESS_STEP_BYTES, Progress


async def test_a_second_file_is_told_of_from_its_beginning() -> None:
    """Else an orchestrator hears nothing for as long as the first file took, and gives up."""
    progress = Progress()
    told: list[tuple[int, int]] = []

    def digest_two_files() -> None:
        for total_steps in (10, 4):
            for step in range(1, total_steps):
                progress.report(step * PROGRESS_STEP_BYTES, total_steps * PROGRESS_STEP_BYTES)

    async def listen() -> None:
        while True:
            told.append(await progress.next())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.to_thread.run_sync(digest_two_files)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert (3 * PROGRESS_STEP_BYTES, 4 * PROGRESS_STEP_BYTES) in told
