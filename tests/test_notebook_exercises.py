"""The exercises of each notebook: where they stand, and what they show before and after."""

import re

from .test_notebooks import each, hygiene, printed, read, tags

KINDS = {  # of exercise: what its cell shows before the reader's work, and its solution after
    "write": ("not attempted yet", r"passed \(\d+ cases\)"),
    "bug": (": not mended yet: ", r"passed \(\d+ cases\)"),
    "predict": ("not attempted yet", r"^right: "),
}


def kind(source: str) -> str:
    """Of an exercise, told by what its cell holds for the reader to replace."""
    if re.search(r"^\w+ = None\b", source, re.MULTILINE):
        return "predict"
    return "write" if "raise NotImplementedError" in source else "bug"


@hygiene
@each
def test_an_exercise_is_explained_and_its_solution_folded_below(name):
    cells = read(name).cells
    exercises = [i for i, cell in enumerate(cells) if "exercise" in tags(cell)]
    solutions = [i for i, cell in enumerate(cells) if "solution" in tags(cell)]
    assert solutions == [i + 1 for i in exercises]
    for i in exercises:
        task, stub, solution = cells[i - 1 : i + 2]
        for part in ("Exercise", "Why", "Difficulty ", " minutes", "<details><summary>"):
            assert part in task.source, task.source
        check = stub.source.splitlines()[-1]
        assert re.fullmatch(r"exercises\.\w+\(.+\)", check)
        assert solution.source.splitlines()[-1] == check
        assert solution.metadata.jupyter == {"source_hidden": True}
        before, after = KINDS[kind(stub.source)]
        assert before in printed([stub])
        assert "differs from the specification" not in printed([stub]), "name the broken rule"
        assert re.search(after, printed([solution]), re.MULTILINE), solution.source


@hygiene
@each
def test_exercises_stand_in_their_section_and_are_of_two_kinds(name):
    cells = read(name).cells
    sections = [re.findall(r"^## (.+)", cell.source, re.MULTILINE) for cell in cells]
    found = []
    for i, cell in enumerate(cells):
        if "exercise" in tags(cell):
            above = [title for cell_titles in sections[:i] for title in cell_titles]
            assert above[-1] == "Exercises", cell.source
            found.append(kind(cell.source))
    assert 2 <= len(found) <= 3
    assert len(set(found)) >= 2, found
