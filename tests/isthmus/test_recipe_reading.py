"""Recipes that cannot be followed are refused whole, before any weight is read: each fault with file, line and key."""

import pytest
import torch

from isthmus import recipe
from isthmus.base.errors import OutputError
from isthmus.base.files import save_state_dict
from isthmus.commands.options import DataOptions, NetworkOptions
from isthmus.recipe import Alignment, Input, Recipe
from isthmus.recipe_faults import RecipeFileError, written
from isthmus.recipe_reading import read
from isthmus.recipe_text import complete, toml

WHOLE = """\
output = "out/m.safetensors"
base = "base.safetensors"
seed = 3
device = "cpu"

[[inputs]]
path = "a.safetensors"
weight = 1

[[inputs]]
path = "b.safetensors"
weight = 0.5

[model]
name = "mlp"
args = { widths = [8] }

[data]
name = "digits"
dir = "data"
split = "test"
limit = 100
batch_size = 50

[align]
method = "weights"
restarts = 1
symmetry = "s.json"
input_shape = [2, 64]
verify = false
options = { choose = "objective" }

[merge]
method = "mean"
split = "test"
options = { by_layer = { "fc1.*" = [0.7, 0.3] } }

[repair]
method = "rescale"

[sha256]
"a.safetensors" = "00ff"

[versions]
torch = "2"
"""


def load(path):
    found, faults = read(path)
    faults.refuse()
    return found


@pytest.fixture
def folder(tmp_path):
    for value, name in enumerate("ab"):
        save_state_dict({"w": torch.tensor([float(value)])}, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def faults(folder):
    """The faults of a recipe, without its name before each."""

    def find(text):
        file = folder / "r.toml"
        file.write_text(text)
        before = sorted(folder.iterdir())
        with pytest.raises(RecipeFileError) as found:
            recipe.load(file)
        assert sorted(folder.iterdir()) == before
        said = str(found.value)
        lines = said.splitlines()
        if len(lines) > 1:
            assert lines.pop(0) == f"{len(lines)} faults in {file}:"
        assert all(line.startswith(f"{file}:") for line in lines)
        return [line.removeprefix(f"{file}:") for line in lines]

    return find


def test_every_key_is_read(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(WHOLE)
    found = load(file)
    assert found == Recipe(
        inputs=(Input(tmp_path / "a.safetensors", 1), Input(tmp_path / "b.safetensors", 0.5)),
        output=tmp_path / "out/m.safetensors",
        options={"by_layer": {"fc1.*": [0.7, 0.3]}},
        split="test",
        base=tmp_path / "base.safetensors",
        model=NetworkOptions("mlp", {"widths": [8]}),
        data=DataOptions("digits", None, tmp_path / "data", "test", 100, 50),
        align=Alignment("weights", {"choose": "objective"}, 1, (), tmp_path / "s.json", (2, 64), False),
        repair="rescale",
        seed=3,
        sha256={tmp_path / "a.safetensors": "00ff"},
        versions={"torch": "2"},
        file=file,
    )
    assert found.weights == [1, 0.5]
    assert found.record == tmp_path / "out/m.safetensors.recipe.toml"


def test_defaults(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('output = "m.safetensors"\ninputs = [{ path = "a.pt" }, { path = "b.pt" }]\n')
    found = load(file)
    assert found == Recipe((Input(tmp_path / "a.pt"), Input(tmp_path / "b.pt")), tmp_path / "m.safetensors", file=file)
    assert found.weights is None
    assert found.align == Alignment("weights")
    file.write_text(file.read_text() + 'base = "c.pt"\n[repair]\n')
    found = load(file)
    assert found.align.method is None  # networks of one parent are in one order
    assert found.repair == "auto"
    file.write_text(file.read_text() + "[align]\nrestarts = 3\n[merge]\n[data]\nname = 'digits'\n")
    assert load(file).align == Alignment(None, restarts=3)


def test_wrong_keys_and_types_are_said_all_at_once(faults):
    found = faults("""\
sed = 1
output = 3
device = ""
[[inputs]]
pth = "a.safetensors"
weight = true
[[inputs]]
path = "b.safetensors"
[model]
args = []
[align]
restarts = 0
verify = "yes"
input_shape = [1, -2]
matchings = ["m", 3]
methd = "weights"
[merge]
options = 2.5
[sha256]
"a.safetensors" = 1
""")
    assert found == [
        "1: sed: there is no such key; did you mean seed, base?",
        "2: output: is 3; expected text",
        "3: device: is ''; expected text",
        "4: inputs[0].path: is missing; give text",
        "5: inputs[0].pth: there is no such key; did you mean path?",
        "6: inputs[0].weight: is true; expected a number",
        "9: model.name: is missing; give text",
        "10: model.args: is an array; expected a table",
        "12: align.restarts: is 0; expected a whole number of at least 1",
        "13: align.verify: is 'yes'; expected true or false",
        "14: align.input_shape: is an array; expected an array of whole numbers of at least 1",
        "15: align.matchings: is an array; expected an array of texts",
        "16: align.methd: there is no such key; did you mean method?",
        "18: merge.options: is 2.5; expected a table",
        '20: sha256."a.safetensors": is 1; expected text',
    ]


def test_wrong_keys_come_together_with_what_cannot_be_done(faults):
    found = faults("""\
output = "m.safetensors"
inputs = [{ path = "a.safetensors" }, { path = "c.safetensors" }]
sed = 1
align = { metod = "none" }
[merge]
method = "ties"
options = { densty = 1 }
""")
    assert [line.partition("; ")[0].partition(" at ")[0] for line in found] == [
        "1: base: is missing: ties works on what was added to a common parent",
        "2: inputs[1].path: no checkpoint",
        "3: sed: there is no such key",
        "4: align.metod: there is no such key",
        "7: merge.options.densty: ties has no such option",
    ]


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(RecipeFileError, match="no recipe at"):
        recipe.load(tmp_path / "none.toml")
    file = tmp_path / "r.toml"
    file.write_text("output = \n")
    with pytest.raises(RecipeFileError, match=r"r.toml is not TOML: Invalid value \(at line 1, column 10\)"):
        recipe.run(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeFileError, match="cannot be read as text"):
        recipe.load(file)
    with pytest.raises(RecipeFileError, match="cannot be read as text"):
        recipe.load(tmp_path)
    file.write_text("")
    with pytest.raises(
        RecipeFileError, match=r"3 faults in .*\n.*:1: output: is missing; .*\n.*:1: inputs: is missing"
    ):
        recipe.load(file)


TWO = """\
inputs = [{ path = "a.safetensors" }, { path = "b.safetensors" }]
output = "m.safetensors"
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[merge]\nmethod = "tie"\n[align]\nmethod = "none"', [
            "4: merge.method: there is no 'tie'; did you mean ties?",
        ]),
        ('[align]\nmethod = "wieghts"', ["4: align.method: there is no 'wieghts'; did you mean weights"]),
        ('[align]\nmethod = "universe"\noptions = { steps = 3 }', [
            "4: align.method: universe runs",
            "5: align.options: universe takes none",
        ]),
        ("", ["1: align.method: weights runs the networks; name their architecture in [model], give `matchings`"]),
        ('[model]\nname = "mlp"', ["1: align: the symmetry is found by running"]),
        (
            '[model]\nname = "mpl"\n[data]\nname = "digit"\nsplit = "val"',
            ["4: model.name: no network 'mpl'; did you mean mlp", "6: data.name: no data set 'digit'", "7: data.split"],
        ),
        (
            '[model]\nname = "mlp"\nargs = { width = 3, seed = 1 }\n[data]\nname = "digits"',
            ["5: model.args.width: no such argument; did you mean widths", "5: model.args.seed: no such argument"],
        ),
        ('[data]\nname = "digits"\n[align]\nmethod = "none"', ["3: data: state dicts of any class cannot be run"]),
        ('[align]\nmatchings = ["m.safetensors", "n.safetensors"]\nmethod = "weights"', [
            "4: align.matchings[0]: no matching at",
            "4: align.matchings[1]: no matching at",
            "4: align.matchings: 2 of them; give one for each input but the first",
            "5: align.method: matchings are given",
            "5: align.method: weights runs",
        ]),
        ('[align]\nmethod = "activations"', ["1: data: is missing: aligning by activations reads batches", "4: align"]),
        ('[align]\nmethod = "none"\n[repair]\nmethod = "rest"', [
            "1: data: is missing: a repair",
            "6: repair.method: there is no 'rest'; did you mean reset",
        ]),
        ('[align]\nmethod = "none"\n[merge]\nmethod = "ties"\noptions = { densty = 0.2, scale = "1" }', [
            "1: base: is missing: ties works on what was added to a common parent",
            "7: merge.options.densty: ties has no such option; did you mean density",
            "7: merge.options.scale: is '1'; expected a number",
        ]),
        ('[align]\nmethod = "none"\n[merge]\nmethod = "regmean"', ["1: data: is missing: regmean reads batches"]),
        ('[merge]\nmethod = "fisher"\noptions = { own_data = 1 }\n[model]\nname = "mlp"\n[data]\nname = "digits"', [
            "5: merge.options.own_data: is 1; expected data, which only a call of isthmus.merge can be given",
        ]),
        ('[align]\nmethod = "none"\n[merge]\nmethod = "slerp"\n[[more]]', ["7: more: there is no such key"]),
        ('device = "abacus"\n[align]\nmethod = "none"', ["3: device: is 'abacus': "]),
        ('base = "c.safetensors"', ["3: base: no checkpoint at "]),
        ('[align]\nmethod = "none"\n[sha256]\n"c.safetensors" = "00"', [
            '6: sha256."c.safetensors": is no file of this recipe',
        ]),
    ],
)  # fmt: skip
def test_what_cannot_be_done(text, said, faults):
    found = faults(TWO + text)
    assert len(found) == len(said)
    assert all(line.startswith(begin) for line, begin in zip(found, said, strict=True)), found


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ('[{ path = "a.safetensors" }]', "1: inputs: 1 of them; mean merges 2 or more"),
        ('[{ path = "a.safetensors" }, { path = "c.pt" }]', "1: inputs[1].path: no checkpoint at "),
        ('[{ path = "a.safetensors" }, { path = "." }]', "1: inputs[1].path: no checkpoint at "),
        (
            '[{ path = "a.safetensors", weight = 1 }, { path = "b.safetensors" }]',
            "1: inputs[1].weight: is missing; give each input one, or none",
        ),
        (
            '[{ path = "a.safetensors", weight = -1 }, { path = "b.safetensors", weight = 2 }]',
            "1: inputs[0].weight: is -1; expected a finite number, not negative",
        ),
        (
            '[{ path = "a.safetensors", weight = 0 }, { path = "b.safetensors", weight = 0.0 }]',
            "1: inputs: all weights are zero",
        ),
        (
            '[{ path = "a.safetensors", base = "a.safetensors" }, { path = "b.safetensors" }]',
            "1: inputs[1].base: is missing; give each input its base, or all one `base`",
        ),
    ],
)
def test_inputs_that_do_not_go_together(inputs, said, faults):
    (found,) = faults(f'inputs = {inputs}\noutput = "m.safetensors"\nalign.method = "none"\n')
    assert found.startswith(said)


def test_bases_of_their_own_and_one_for_all(faults):
    inputs = '[{ path = "a.safetensors", base = "a.safetensors" }, { path = "b.safetensors", base = "b.safetensors" }]'
    (found,) = faults(f'inputs = {inputs}\noutput = "m.safetensors"\nbase = "a.safetensors"\n')
    assert found.startswith("3: base: each input has its base already")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("m.pt", "must end in .safetensors"),
        ("none/m.safetensors", "there is no folder"),
        ("a.safetensors", "which inputs.0.path reads; choose another name"),
        ("./x/../b.safetensors", "which inputs.1.path reads"),
    ],
)
def test_places_that_cannot_be_written(output, said, faults, folder):
    (folder / "x").mkdir()
    (found,) = faults(TWO.replace("m.safetensors", output) + 'align.method = "none"\n')
    assert found.startswith("2: output: ")
    assert said in found


def test_a_folder_where_the_complete_recipe_would_be(faults, folder):
    (folder / "m.safetensors.recipe.toml").mkdir()
    (found,) = faults(TWO + 'align.method = "none"\n')
    assert "it is a folder" in found


def test_a_recipe_that_would_be_written_over(folder):
    file = folder / "m.safetensors.recipe.toml"
    file.write_text(TWO + 'align.method = "none"\n')
    with pytest.raises(RecipeFileError, match="would be written over this one"):
        recipe.load(file)


def test_toml_is_read_as_it_was_written():
    tomllib = pytest.importorskip("tomllib")
    content = {
        "seed": 0,
        "a key": 'quotes " and \\ and é and \x7f and \n',
        "numbers": [1, -2.5, 1e300, 1e-9, True, []],
        "table": {"empty": {}, "*.bias": {"x": [{"y": [1, 2]}]}, "none": None},
        "rows": [{"path": "a"}, {"path": "b", "weight": 0.5}],
        "nothing": None,
        "last": [],
    }
    expected = {key: value for key, value in content.items() if value is not None}
    expected["table"] = {"empty": {}, "*.bias": {"x": [{"y": [1, 2]}]}}
    assert tomllib.loads(toml(content)) == expected
    with pytest.raises(OutputError, match="a set cannot be written"):
        toml({"x": {1}})


def test_a_complete_recipe_says_the_same_from_another_folder(folder):
    (folder / "out").mkdir()
    (folder / "r.toml").write_text(WHOLE)
    found = load(folder / "r.toml")
    (folder / "out" / "again.toml").write_text(complete(found))
    again = load(folder / "out" / "again.toml")
    assert "../a.safetensors" in complete(found)
    assert [source.path.resolve() for source in again.inputs] == [source.path for source in found.inputs]
    assert again.output.resolve() == found.output
    assert again.data is not None
    assert again.data.data_dir is not None
    assert again.data.data_dir.resolve() == folder / "data"
    assert (again.model, again.seed, again.repair, again.split) == (found.model, 3, "rescale", "test")
    assert (again.options, again.weights) == (found.options, [1, 0.5])
    assert again.align.options["choose"] == "objective"
    assert complete(again, folder=folder / "out") == complete(found)


def test_places_as_one_would_type_them():
    assert written(("align", "options", "by layer", 2)) == 'align.options."by layer"[2]'
