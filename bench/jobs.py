"""A list of measurements, and what becomes of it when one fails or the user has had enough."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Job = tuple[str, Callable[[], Iterable[Any]]]  # a title, and what yields results


@dataclass(frozen=True)
class Failure:
    """A job that raised, which no job should."""

    job: str
    error: str


def run(work: Sequence[Job], console: Console) -> list[Any]:
    """All results, with a `Failure` for each job that raised; with Ctrl-C those that are there."""
    results: list[Any] = []
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(work))
        try:
            for title, job in work:
                progress.update(task, description=title)
                try:
                    results.extend(job())
                except Exception as error:
                    console.print_exception()
                    results.append(Failure(title, f"{type(error).__name__}: {error}"))
                progress.advance(task)
        except KeyboardInterrupt:
            console.print("Interrupted: what follows is what was finished.")
    return results
