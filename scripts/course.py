"""Run the course's notebooks, or store their outputs.

    python scripts/course.py run [NAME ...] [-p PARAMETER VALUE ...]
    python scripts/course.py store [NAME ...]

`run` executes notebooks with papermill, side by side, into build/. Each gets those of the given
parameters that it declares. `store` executes them where they are, one after the other, and leaves
nothing in the files but what a second run would leave as well. NAME is the beginning of a file
name, such as 02; without one, all notebooks are meant.
"""

import argparse
import concurrent.futures
import difflib
import os
import subprocess
import sys
import time
from pathlib import Path

import nbclient
import nbformat
import papermill

HERE = Path(__file__).resolve().parents[1] / "notebooks"
BUILD = HERE.parent / "build"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "pygments_lexer": "ipython3",
}
KEPT = ("jupyter", "tags")  # of a cell's metadata


def find(names: list[str]) -> list[Path]:
    """The notebooks whose file names begin with one of `names`, in the order of the course."""
    course = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in course):
            sys.exit(f"no notebook begins with {name!r}: there are {[p.stem for p in course]}")
    return [path for path in course if path.name.startswith(tuple(names) or "")]


def run(notebooks: list[Path], parameters: list[tuple[str, str]], workers: int) -> int:
    """Execute copies in build/, print a table of how each went, and count those that failed."""
    declared = {path: set(papermill.inspect_notebook(path)) for path in notebooks}
    known = sorted(set().union(*declared.values()))
    for name, _ in parameters:
        if name not in known:
            nearest = ", ".join(difflib.get_close_matches(name, known, n=1) or known)
            sys.exit(f"no notebook here declares {name}: did you mean {nearest}?")
    BUILD.mkdir(exist_ok=True)

    def one(path: Path) -> tuple[Path, float, str]:
        begin = time.perf_counter()
        given = [(name, value) for name, value in parameters if name in declared[path]]
        outcome = execute(path, BUILD / path.name, given, threads=(os.cpu_count() or 1) // workers)
        print(f"{path.stem}: {outcome}", flush=True)
        return path, time.perf_counter() - begin, outcome

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(one, notebooks))
    print(f"\n{'notebook':<28}{'seconds':>8}  result")
    for path, seconds, outcome in rows:
        print(f"{path.stem:<28}{seconds:>8.0f}  {outcome}")
    return sum(outcome != "ok" for _, _, outcome in rows)


def execute(source: Path, target: Path, parameters: list[tuple[str, str]], threads: int) -> str:
    """Run one notebook through papermill's command: "ok", or the failing cell and its error."""
    target.unlink(missing_ok=True)
    options = [word for name, value in parameters for word in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", source, target, "--no-progress-bar", *options]
    environment = {"OMP_NUM_THREADS": str(max(1, threads)), **os.environ}
    log = target.with_suffix(".log")
    with log.open("w") as output:
        code = subprocess.call(
            command, cwd=BUILD, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    if code == 0:
        return "ok"
    for cell in nbformat.read(target, 4).cells if target.exists() else []:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                message = " ".join(output.evalue.split())
                return f"cell [{cell.execution_count}] {output.ename}: {message}"
    return f"papermill exited with {code}: see {log.relative_to(HERE.parent)}"


def store(notebooks: list[Path]) -> None:
    """Execute in place; a cell that fails stops the command and leaves its file as it was."""
    for path in notebooks:
        print(f"{path.stem} ...", end=" ", flush=True)
        begin = time.perf_counter()
        notebook = nbformat.v4.upgrade(nbformat.read(path, as_version=4))
        nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": HERE}},
        ).execute()
        clean(notebook)
        nbformat.write(notebook, path)
        print(f"{time.perf_counter() - begin:.0f} s")


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave only what belongs to the course: no versions, widget models or marks of other tools."""
    notebook.metadata = {"kernelspec": KERNELSPEC, "language_info": LANGUAGE}
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in KEPT if key in cell.metadata}
        for output in cell.get("outputs", []):
            # Its model does not outlive the kernel; the text beside it is what a reader sees.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def main() -> int:
    cores = min(os.cpu_count() or 1, 4)
    parser = argparse.ArgumentParser(description="Run the notebooks, or store their outputs.")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run notebooks with papermill, into build/")
    pair = {"nargs": 2, "metavar": ("PARAMETER", "VALUE"), "dest": "parameters"}
    runner.add_argument("-p", action="append", default=[], **pair)
    runner.add_argument("--workers", type=int, default=cores, help=f"side by side ({cores})")
    storer = commands.add_parser("store", help="run notebooks in place")
    for command in (runner, storer):
        command.add_argument("names", nargs="*", metavar="NAME", help="beginning of a file name")
    options = parser.parse_args()
    if options.command == "run":
        return min(run(find(options.names), options.parameters, options.workers), 1)
    return store(find(options.names)) or 0


if __name__ == "__main__":
    sys.exit(main())
