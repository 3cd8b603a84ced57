"""Mutations are still of code that is there, and one of them is noticed by its notebook."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("mutations", ROOT / "scripts" / "mutations.py")
mutations = sys.modules["mutations"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_code_that_still_compiles(mutation, tmp_path):
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    copy = tmp_path / mutation.file
    copy.parent.mkdir(parents=True)
    copy.write_text(source, encoding="utf-8")
    mutations.mutate(tmp_path, mutation)
    assert copy.read_text(encoding="utf-8") != source
    compile(copy.read_text(encoding="utf-8"), mutation.file, "exec")
    assert list(ROOT.glob(f"notebooks/{mutation.notebook}_*.ipynb"))


def test_a_mutation_of_code_that_changed_is_refused(tmp_path):
    (tmp_path / "moe_ref").mkdir()
    (tmp_path / "moe_ref" / "routing.py").write_text("")
    with pytest.raises(SystemExit, match="ties go to the higher expert: .* does not hold once"):
        mutations.mutate(tmp_path, mutations.MUTATIONS[0])


def test_the_notebook_of_routing_notices_another_rule_for_ties():
    failure = mutations.try_out("02", mutations.MUTATIONS[0])
    assert failure.startswith("Cell ")
