"""Run the course's notebooks, store their outputs, or copy them for work.

    python scripts/course.py run [NAME ...] [-p PARAMETER VALUE ...]
    python scripts/course.py store [NAME ...]
    python scripts/course.py pins > tests/pins.py
    python scripts/course.py lab [--reset]

`run` executes notebooks with papermill, side by side, into build/. Each gets those of the given
parameters that it declares. `store` executes them where they are, one after the other, on one
thread, and leaves nothing in the files but what a second run would leave as well. It stores no
notebook in which a claim about time does not hold, and begins none with claims on a busy machine.
`pins` prints the table of what each notebook must not lose unnoticed. `lab` copies into lab/ what
is not there yet; with --reset it first moves that folder aside. NAME is the beginning of a file
name, such as 02; without one, all notebooks are meant.
"""

import argparse
import ast
import base64
import concurrent.futures
import difflib
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import nbclient
import nbformat
import papermill

HERE = Path(__file__).resolve().parents[1] / "notebooks"
BUILD = HERE.parent / "build"
LAB = HERE.parent / "lab"  # a learner's own copies; git ignores it, and make clean leaves it
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "pygments_lexer": "ipython3",
}
KEPT = ("jupyter", "tags")  # of a cell's metadata

QUIET = 0.9  # share of a core that every process must get where time is measured
# How much of two seconds a process that only counts is given.
COUNT = """
import time
begin, used = time.perf_counter(), time.process_time()
while (wall := time.perf_counter() - begin) < 2:
    pass
print((time.process_time() - used) / wall)
"""


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


def store(notebooks: list[Path], quiet: float = QUIET) -> None:
    """Execute in place; a cell that fails, or a claim, stops the command and leaves its file."""
    for path in notebooks:
        print(f"{path.stem} ...", end=" ", flush=True)
        begin = time.perf_counter()
        notebook = nbformat.v4.upgrade(nbformat.read(path, as_version=4))
        if any("lesson.claim(" in cell.source for cell in notebook.cells):
            refuse_a_busy_machine(quiet)
        client = nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": HERE}},
        )
        client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
        if false := false_claims(notebook):
            sys.exit("not stored, for in this run these claims did not hold: " + "; ".join(false))
        clean(notebook)
        nbformat.write(notebook, path)
        print(f"{time.perf_counter() - begin:.0f} s")


def refuse_a_busy_machine(quiet: float) -> None:
    """Exit if a process on each core gets less of it than `quiet`: times would mean nothing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    command = [sys.executable, "-c", COUNT]
    counting = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(cores or 1)]
    shares = [float(process.communicate()[0]) for process in counting]
    if (share := sum(shares) / len(shares)) < quiet:
        load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        sys.exit(
            f"not stored, for this machine is busy: a process on each of its {len(shares)} cores "
            f"got {share:.0%} of it ({quiet:.0%} needed{load}). Stop what else runs, and try again."
        )


def false_claims(notebook: nbformat.NotebookNode) -> list[str]:
    """What `lesson.claim` printed as not holding."""
    printed = (o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    return re.findall(r"^claim: (.*): does not hold in this run$", "\n".join(printed), re.MULTILINE)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave only what belongs to the course: no versions, widget models or marks of other tools."""
    notebook.metadata = {"kernelspec": KERNELSPEC, "language_info": LANGUAGE}
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in KEPT if key in cell.metadata}
        for output in cell.get("outputs", []):
            # Its model does not outlive the kernel; the text beside it is what a reader sees.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def pins(path: Path) -> dict[str, int]:
    """What a notebook must not lose unnoticed, as numbers."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    images = [
        base64.b64decode(output.data["image/png"])
        for cell in code
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    sizes = [struct.unpack(">II", image[16:24]) for image in images]  # PNG's header
    return {
        "asserts": sum(isinstance(node, ast.Assert) for node in nodes),
        "compares": calls.count("lesson.compare"),
        "claims": calls.count("lesson.claim"),
        "not_compared": sum("nbval-ignore-output" in c.metadata.get("tags", []) for c in code),
        "images": len(images),
        "least_bytes": min(map(len, images), default=0),
        "least_width": min((width for width, _ in sizes), default=0),
        "least_height": min((height for _, height in sizes), default=0),
    }


def print_pins(notebooks: list[Path]) -> None:
    """The table that tests/pins.py holds."""
    rows = {path.stem: pins(path) for path in notebooks}
    print('"""What each notebook must not lose unnoticed."""\n')
    print("# After a change that is meant: python scripts/course.py pins > tests/pins.py")
    print("COLUMNS = (")
    for column in next(iter(rows.values())):
        print(f'    "{column}",')
    print(")\nPINS = {")
    for name, row in rows.items():
        print(f'    "{name}": {tuple(row.values())},')
    print("}")


def lab(reset: bool, folder: Path = LAB) -> None:
    """Copy the course into `folder`; what the learner has there is never written over."""
    if reset and folder.exists():
        aside = folder.with_name(time.strftime(f"{folder.name}-%Y-%m-%d-%H%M%S"))
        folder.rename(aside)
        print(f"your work is in {aside.name}/ now")
    folder.mkdir(parents=True, exist_ok=True)
    files = [*find([]), HERE / "glossary.md"]
    new = [path for path in files if not (folder / path.name).exists()]
    for path in new:
        shutil.copyfile(path, folder / path.name)
    kept = len(files) - len(new)
    print(f"{folder.name}/: {len(new)} copied, {kept} left as they were")


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
    commands.add_parser("pins", help="print the table of tests/pins.py")
    learner = commands.add_parser("lab", help="copy the notebooks into lab/")
    learner.add_argument("--reset", action="store_true", help="move lab/ aside first")
    options = parser.parse_args()
    if options.command == "run":
        return min(run(find(options.names), options.parameters, options.workers), 1)
    if options.command == "store":
        store(find(options.names))
    elif options.command == "pins":
        print_pins(find([]))
    else:
        lab(options.reset)
    return 0


if __name__ == "__main__":
    sys.exit(main())
