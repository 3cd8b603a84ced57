"""The controls in the notebooks work when the whole notebook has run."""

import ast
import json
import symtable

import nbclient
import nbformat
import papermill
import pytest

from .test_notebooks import PATHS, SETTINGS, code_cells, hygiene

WIDGETS = [name for name in PATHS if any("ipywidgets" in c.source for c in code_cells(name))]

# After a notebook's last cell: moves every control, and notes what its callbacks print and display.
MOVE = """
def _move_every_control(shell):
    import contextlib, io, json, sys
    from ipywidgets.widgets import widget

    moved, errors, displayed = {}, [], []

    def positions(control):
        if hasattr(control, "min"):
            return [control.min, control.max, control.min]
        if getattr(control, "options", None):
            return [value for name, value in control._options_full]
        if isinstance(control.value, bool):
            return [True, False, True]
        return ["The key was stolen.", "rm -rf build"]

    def note(message):
        displayed.append(str(message["content"].get("data", "")))

    shell.showtraceback = lambda *args, **kwargs: errors.append(repr(sys.exc_info()[1]))
    shell.display_pub.register_hook(note)
    for control in list(widget._instances.values()):
        if hasattr(control, "value") and hasattr(control, "disabled"):  # no progress bar
            seen = moved.setdefault(f"{type(control).__name__} {control.description}", [])
            for value in positions(control):
                displayed.clear()
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    try:
                        control.value = value
                    except Exception as error:
                        errors.append(repr(error))
                seen.append(printed.getvalue() + "".join(displayed))
    shell.display_pub.unregister_hook(note)
    sys.stdout.write(json.dumps([moved, errors]))

_move_every_control(get_ipython())
"""


@hygiene
@pytest.mark.parametrize("name", WIDGETS)
def test_no_later_cell_assigns_a_name_that_a_control_uses(name):
    """It would change, or break, what the control does once the whole notebook has run."""
    sources = [cell.source for cell in code_cells(name)]
    for i, source in enumerate(sources):
        if "ipywidgets" in source:
            later = set().union(*map(bound, sources[i + 1 :]))
            again = sorted(needed(sources[: i + 1]) & later)
            assert not again, f"used by the control, and assigned below it: {again}"


def bound(source: str) -> set[str]:
    """Names that a cell gives a value in the notebook's namespace, but for imports."""
    symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() and not s.is_imported()}


def needed(sources: list[str]) -> set[str]:
    """Names of the notebook that functions of the last cell use, or functions handed on there.

    And the names that the functions so named use in their turn.
    """
    functions: dict[str, list] = {}
    for source in sources:
        last = symtable.symtable(source, "cell", "exec").get_children()
        functions |= {table.get_name(): [table] for table in last}
    calls = [n for n in ast.walk(ast.parse(sources[-1])) if isinstance(n, ast.Call)]
    handed = {ast.unparse(argument) for call in calls for argument in call.args}
    todo = last + [table for name in handed for table in functions.get(name, [])]
    found = handed & set(functions)
    while todo:
        table = todo.pop()
        used = {s.get_name() for s in table.get_symbols() if s.is_global()} - found
        found |= used
        todo += table.get_children()
        todo += [other for name in used for other in functions.get(name, [])]
    return found


@pytest.mark.parametrize("name", WIDGETS)
def test_every_control_works_after_the_whole_notebook_has_run(name, tmp_path):
    notebook = papermill.iorw.load_notebook_node(str(PATHS[name]))
    notebook = papermill.parameterize.parameterize_notebook(notebook, SETTINGS[name][0])
    notebook.cells.append(nbformat.v4.new_code_cell(MOVE))
    resources = {"metadata": {"path": tmp_path}}
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources
    )
    client.execute()
    moved, errors = json.loads(notebook.cells[-1].outputs[0].text)
    assert not errors
    assert moved
    for control, seen in moved.items():
        shown = set(filter(None, seen))  # nothing where it stood already
        assert len(shown) >= 2, f"{control} shows the same wherever it stands"
