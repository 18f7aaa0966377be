"""The command `python -m prism_nb.phantom`: write a phantom cohort into a folder.

Exit codes: 0 done, 1 the disk or the system would not, 2 bad usage, 130 interrupted. The same
command goes on where an interrupted one stopped.
"""

import argparse
import sys
from pathlib import Path

from prism_nb.phantom.cohort import SIDECAR, write_cohort


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, as everywhere in the project."""
        self.exit(2, f"phantom: {message}; --help lists the options\n")


def _options(arguments):
    parser = _Parser(prog="python -m prism_nb.phantom", description="Write a phantom cohort.")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the cohort")
    add("--patients", type=int, required=True, metavar="N", help="patients, a film each")
    add("--size", type=int, default=512, help="pixels a side, at least 64 (512)")
    add("--seed", type=int, default=0, help="every random draw starts here (0)")
    add(
        "--confounding",
        type=float,
        default=0.75,
        metavar="P",
        help="P(device | effusion), from 0.566: no link, to 0.97 (0.75)",
    )
    add(
        "--mode",
        choices=("confounded", "treatment"),
        default="confounded",
        help="devices share a hidden cause with disease, or treat it (confounded)",
    )
    add("--uncertain", action="store_true", help="label the mildest cases -1, as reports hedge")
    add("--workers", type=int, default=None, help="processes, 0 for none (one a core)")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Write the cohort that the command line asks for, and say where it is; an exit code."""
    options = _options(arguments)
    try:
        labels = write_cohort(
            options.out,
            options.patients,
            options.size,
            options.seed,
            options.confounding,
            options.mode,
            options.uncertain,
            workers=options.workers,
            progress=sys.stderr.isatty(),
        )
    except ValueError as error:
        return _failed(error, 2)
    except OSError as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted; the same command continues", 130)
    print(f"{options.patients} films in {options.out}: {labels.name}, train/, masks/, {SIDECAR}")
    name = f"phantom_{options.patients}"  # a run of its own, beside that of the profile
    print(f"next: prism-nb run params/phantom.yaml --name {name} --set csv={labels}")
    return 0


def _failed(error, code):
    print(f"phantom: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
