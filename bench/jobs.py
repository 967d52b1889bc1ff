"""A list of measurements, and what becomes of it when one fails or the user has had enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .contenders import told
from .records import Failure, Results

Job = tuple[str, Callable[[], Iterable[Any]]]  # a title, and what yields records


def run(work: Sequence[Job], results: Results, path: Path, console: Console) -> bool:
    """Whether it came to the end: with Ctrl-C it does not.

    Args:
        results: get the records, with a `Failure` for each job that raised.
        path: where they are saved after each job.
    """
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(work))
        try:
            for title, job in work:
                progress.update(task, description=title)
                try:
                    for record in job():
                        results.add(record)
                except Exception as error:
                    console.print_exception()
                    results.add(Failure(title, told(error)))
                results.save(path)
                progress.advance(task)
        except KeyboardInterrupt:
            console.print("Interrupted: what follows is what was finished.")
            return False
        finally:
            results.save(path)
    return True
