"""The command `prism-nb`: run a profile, look at a run, list parameters, check the machine.

Exit codes: 0 done, 1 a notebook failed or something is missing, 2 bad usage.
Everything heavy is imported inside the commands, so that the command line starts fast.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
NOTEBOOKS = typer.Option("--notebooks", hidden=True, help="Folder of the notebooks.")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    from prism_nb.execute import StepFailed
    from prism_nb.params import ParamError
    from prism_nb.run import RunFolderError

    try:
        yield
    except (ParamError, RunFolderError) as error:
        _stop(error, 2)
    except (StepFailed, OSError) as error:
        _stop(error, 1)
    except KeyboardInterrupt:
        _stop("interrupted; the same command continues", 130)


def _stop(error: object, code: int) -> None:
    print(f"prism-nb: {error}", file=sys.stderr)
    raise typer.Exit(code) from None


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """PRISM as notebooks: counterfactual chest radiographs."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    profile: Annotated[Path, typer.Argument(help="A profile, such as params/phantom.yaml.")],
    name: Annotated[str, typer.Option(help="Run folder runs/NAME, not the profile's.")] = "",
    only: Annotated[str, typer.Option(help="One notebook, such as 04_edit or 04.")] = "",
    start: Annotated[str, typer.Option("--from", help="This notebook and those after it.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Run what has not changed, too.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, over the profile; repeatable.")
    ] = None,
    notebooks: Annotated[Path | None, NOTEBOOKS] = None,
) -> None:
    """Execute the notebooks into a run folder; what has not changed is skipped."""
    from prism_nb.execute import StepFailed, chosen_steps, prepare, run_job
    from prism_nb.report import report_path, write_report

    with _one_line_errors():
        steps = chosen_steps(only, start)
        job = prepare(profile, name, tuple(settings or ()), notebooks)
        try:
            ran = run_job(job, steps, force)
        except StepFailed:
            with contextlib.suppress(OSError):  # the failure is the news, not its report
                write_report(job.folder)
            raise
        if ran or not report_path(job.folder).exists():
            write_report(job.folder)
        print(f"  report        {report_path(job.folder)}")


@app.command()
def status(
    folder: Annotated[Path | None, typer.Argument(help="A run folder; else all runs.")] = None,
    notebooks: Annotated[Path | None, NOTEBOOKS] = None,
) -> None:
    """Say of each notebook of a run whether its results still stand, and if not, why."""
    from prism_nb.execute import states
    from prism_nb.run import RunFolderError, project_root

    with _one_line_errors():
        if folder is not None and not (folder / "manifest.json").is_file():
            raise RunFolderError(f"{folder} holds no run; `prism-nb run PROFILE` makes one")
        runs = [folder] if folder else sorted(project_root().glob("runs/*/"))
        runs = [each for each in runs if (each / "manifest.json").is_file()]
        for each in runs:
            print(each)
            for row in states(each.resolve(), notebooks):
                print(f"  {row['notebook']:<14}{row['state']:<12}{row['detail']}")
        if not runs:
            print("no runs yet: prism-nb run params/phantom.yaml makes one")


@app.command()
def params(
    notebook: Annotated[str, typer.Argument(help="Such as 02_finetune; or all.")] = "all",
) -> None:
    """List the parameters of a notebook: type, default, what is allowed, what it means."""
    from prism_nb.params import MODELS, describe, notebook_name

    with _one_line_errors():
        names = list(MODELS) if notebook == "all" else [notebook_name(notebook)]
        for name in names:
            print(name)
            for row in describe(name):
                given = f"{row['name']}: {row['type']} = {row['default']!r}"
                allowed = f"  [{row['allowed']}]" if row["allowed"] else ""
                print(f"  {given:<44}  {row['help']}{allowed}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the HTML report of a run again."""
    from prism_nb.report import write_report
    from prism_nb.run import RunFolderError

    with _one_line_errors():
        if not (folder / "manifest.json").is_file():
            raise RunFolderError(f"{folder} holds no run; `prism-nb run PROFILE` makes one")
        print(write_report(folder.resolve()))


@app.command()
def doctor() -> None:
    """Check this machine: Python, packages, device, memory, disk, kernel; how to fix what lacks."""
    from prism_nb.doctor import checks

    rows = list(checks())
    for row in rows:
        print(f"  {'ok' if row.good else 'MISSING':<9}{row.what:<16}{row.found}")
        if not row.good:
            print(f"  {'':<9}{'':<16}-> {row.fix}")
    raise typer.Exit(0 if all(row.good for row in rows) else 1)


if __name__ == "__main__":
    app()
