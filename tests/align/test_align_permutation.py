"""Permutations: applied, composed, inverted, saved, and refused where they do not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.align import Permutation, Symmetry, symmetry
from isthmus.base.architecture import full_state
from isthmus.base.errors import ArchitectureError, CheckpointError, OutputError

NESTED = ("mlp", "group norm", "grouped conv", "depthwise", "transposed grouped conv", "padded shortcut")


@pytest.fixture(scope="module")
def symmetries(cases: dict[str, Any]) -> dict[str, Symmetry]:
    return {name: symmetry(case.model(), case.data(), verify=False) for name, case in cases.items()}


def drawn(found: Symmetry, seed: int) -> Permutation:
    return found.random(torch.Generator().manual_seed(seed))


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Applying


def test_the_function_stays_and_the_weights_move(case: Any) -> None:
    model, x = case.model(double=True), case.data()
    x = x.double() if x.is_floating_point() else x
    before = copy.deepcopy(full_state(model))
    permutation = drawn(symmetry(model, x), 5)
    assert not permutation.is_identity
    new = permutation.apply(model)
    assert type(new) is type(model)
    with torch.no_grad():
        assert float((new(x) - model(x)).abs().max()) < 1e-12 * float(model(x).abs().max())
    for group in permutation.symmetry.groups:
        still = permutation.symmetry.identity().indices[group.name]
        if not torch.equal(permutation.indices[group.name], still):
            name = group.axes[0][0]
            assert not torch.equal(full_state(new)[name], before[name])
    # a permutation moves entries and changes none
    for name, tensor in full_state(new).items():
        assert torch.equal(tensor.flatten().sort().values, before[name].flatten().sort().values)
    # the original is as it was, and shares nothing with the new one
    assert equal(full_state(model), before)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert equal(full_state(model), before)


def test_models_and_state_dicts_are_permuted_alike(case: Any) -> None:
    model = case.model()
    state = copy.deepcopy(model.state_dict())
    permutation = drawn(symmetry(model, case.data()), 1)
    from_state = permutation.apply(model.state_dict())
    assert equal(from_state, dict(permutation.apply(model).state_dict()))
    assert equal(model.state_dict(), state)
    twin = case.model()
    twin.load_state_dict(from_state)
    assert torch.equal(twin(case.data()), permutation.apply(model)(case.data()))


def test_an_application_is_the_indexing_that_it_says(symmetries: dict[str, Symmetry], cases: dict[str, Any]) -> None:
    permutation = drawn(symmetries["mlp"], 0)
    state = cases["mlp"].model().state_dict()
    new = permutation.apply(state)
    first, second = permutation.indices["0"], permutation.indices["2"]
    assert torch.equal(new["0.weight"], state["0.weight"][first])
    assert torch.equal(new["2.weight"], state["2.weight"][second][:, first])
    assert torch.equal(new["4.weight"], state["4.weight"][:, second])
    assert torch.equal(new["4.bias"], state["4.bias"])


def test_running_statistics_move_with_their_channels(symmetries: dict[str, Symmetry], cases: dict[str, Any]) -> None:
    permutation = drawn(symmetries["conv and batch norm"], 0)
    state = cases["conv and batch norm"].model().state_dict()
    new = permutation.apply(state)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(new[f"1.{name}"], state[f"1.{name}"][permutation.indices["0"]])
        assert not torch.equal(new[f"1.{name}"], state[f"1.{name}"])
    assert new["1.num_batches_tracked"] == state["1.num_batches_tracked"]


def test_tied_weights_stay_tied(cases: dict[str, Any]) -> None:
    case = cases["tied embedding"]
    model = case.model()
    new: Any = drawn(symmetry(model, case.data()), 0).apply(model)
    assert new.head.weight is new.table.weight


def test_modes_hooks_types_and_gradients_come_along(cases: dict[str, Any], symmetries: dict[str, Symmetry]) -> None:
    model = cases["mlp"].model().to(torch.bfloat16).train()
    model[0].weight.requires_grad_(False)
    new: Any = drawn(symmetries["mlp"], 0).apply(model)
    assert new.training
    assert new[0].weight.dtype == torch.bfloat16
    assert not new[0].weight.requires_grad
    assert new[2].weight.requires_grad
    assert isinstance(new[2].weight, nn.Parameter)


class Unsaved(nn.Module):
    """A buffer that the state dict does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) * self.scale).tanh())


def test_unsaved_buffers_hold_their_units_and_are_not_asked_of_state_dicts() -> None:
    """A permuted state dict would be loaded beside an unpermuted buffer, so the buffer's order is that of its units."""
    model = Unsaved()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    found = symmetry(model, x)
    assert found.unsaved == ("scale",)
    assert found.groups == ()
    assert {p.reason for p in found.pinned if p.name == "up.bias"} == {"a buffer that a state dict does not hold"}
    permutation = drawn(found, 0)
    assert torch.equal(full_state(permutation.apply(model))["scale"], full_state(model)["scale"])
    assert "scale" not in permutation.apply(model.state_dict())


# Group laws


@pytest.mark.parametrize("name", NESTED)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 3))
def test_group_laws(
    name: str, seeds: tuple[int, int, int], symmetries: dict[str, Symmetry], cases: dict[str, Any]
) -> None:
    found = symmetries[name]
    p, q, r = (drawn(found, seed) for seed in seeds)
    one = found.identity()
    assert p.compose(q).compose(r) == p.compose(q.compose(r))
    assert p.compose(one) == p == one.compose(p)
    assert p.compose(p.inverse()).is_identity
    assert p.inverse().compose(p).is_identity
    assert p.inverse().inverse() == p
    assert p.compose(q).inverse() == q.inverse().compose(p.inverse())
    state = cases[name].model().state_dict()
    assert equal(p.compose(q).apply(state), p.apply(q.apply(state)))
    assert equal(p.inverse().apply(p.apply(state)), dict(state))
    assert equal(one.apply(state), dict(state))


def test_permutations_are_compared_by_their_indices(symmetries: dict[str, Symmetry]) -> None:
    found = symmetries["mlp"]
    assert drawn(found, 1) == drawn(found, 1)
    assert hash(drawn(found, 1)) == hash(drawn(found, 1))
    assert drawn(found, 1) != drawn(found, 2)
    assert drawn(found, 1) != drawn(symmetries["glu"], 1)
    assert drawn(found, 1) != "a permutation"


def test_permutations_of_different_symmetries_do_not_compose(symmetries: dict[str, Symmetry]) -> None:
    with pytest.raises(ArchitectureError, match="different symmetries"):
        drawn(symmetries["mlp"], 0).compose(drawn(symmetries["glu"], 0))


# What does not fit


def test_a_missing_key_is_named_with_its_shape(symmetries: dict[str, Symmetry], cases: dict[str, Any]) -> None:
    state = cases["mlp"].model().state_dict()
    state["2.weigth"] = state.pop("2.weight")
    permutation = drawn(symmetries["mlp"], 0)
    with pytest.raises(ArchitectureError, match=r"2\.weigth is not part of this symmetry; did you mean 2\.weight"):
        permutation.apply(state)
    del state["2.weigth"]
    with pytest.raises(ArchitectureError, match=r"2\.weight of shape \(10, 12\) is missing; did you mean"):
        permutation.apply(state)


def test_another_shape_is_named_beside_the_expected_one(symmetries: dict[str, Symmetry], cases: dict[str, Any]) -> None:
    state = cases["mlp"].model().state_dict()
    state["0.bias"] = torch.zeros(13)
    with pytest.raises(ArchitectureError, match=r"0\.bias has shape \(13,\), but this permutation is for \(12,\)"):
        drawn(symmetries["mlp"], 0).apply(state)


def test_another_model_is_refused(symmetries: dict[str, Symmetry], cases: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError):
        drawn(symmetries["mlp"], 0).apply(cases["glu"].model())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.arange(11), r"group 0: indices of shape \(12,\) expected, shape \(11,\) given"),
        (torch.arange(12)[None], r"shape \(1, 12\) given"),
        (torch.zeros(12, dtype=torch.long), "group 0: the indices are no permutation of 0 … 11"),
        (torch.arange(12) + 1, "are no permutation"),
        (torch.arange(12) - 1, "are no permutation"),
        (torch.arange(12.0), "are no permutation"),
        (torch.arange(12, dtype=torch.int32), "are no permutation"),
        (None, r"group 0: indices of shape \(12,\) expected, nothing given"),
    ],
)
def test_indices_that_are_no_permutation_are_refused(index: Any, message: str, symmetries: dict[str, Symmetry]) -> None:
    found = symmetries["mlp"]
    indices = {**found.identity().indices, "0": index}
    with pytest.raises(ArchitectureError, match=message):
        Permutation(found, {name: i for name, i in indices.items() if i is not None})


def test_indices_of_a_group_that_is_not_there_are_refused(symmetries: dict[str, Symmetry]) -> None:
    found = symmetries["residual"]
    indices = {**found.identity().indices, "up.2": torch.arange(3)}
    with pytest.raises(ArchitectureError, match=r"indices for up\.2, which is no group .*did you mean up\.1"):
        Permutation(found, indices)


def test_every_block_needs_a_permutation_of_its_own(symmetries: dict[str, Symmetry]) -> None:
    found = symmetries["group norm"]
    inner = found.identity().indices["0:2"].clone()
    assert inner.shape == (4, 3)
    inner[2] = torch.tensor([0, 0, 1])
    with pytest.raises(ArchitectureError, match="group 0:2: the indices are no permutation of 0 … 2"):
        Permutation(found, {**found.identity().indices, "0:2": inner})
    with pytest.raises(ArchitectureError, match=r"indices of shape \(4, 3\) expected, shape \(3,\) given"):
        Permutation(found, {**found.identity().indices, "0:2": torch.arange(3)})


# Files


def test_a_permutation_survives_its_file(case: Any, tmp_path: Path) -> None:
    model = case.model()
    permutation = drawn(symmetry(model, case.data()), 3)
    read = Permutation.load(permutation.save(tmp_path / "p.safetensors"))
    assert read == permutation
    assert read.symmetry.to_json() == permutation.symmetry.to_json()
    assert equal(read.apply(model.state_dict()), permutation.apply(model.state_dict()))
    assert read.compose(permutation.inverse()).is_identity
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_other_names_are_refused(symmetries: dict[str, Symmetry], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"end the name in \.safetensors"):
        drawn(symmetries["mlp"], 0).save(tmp_path / "p.pt")
    with pytest.raises(OutputError, match="cannot write"):
        drawn(symmetries["mlp"], 0).save(tmp_path / "none" / "p.safetensors")


def test_foreign_and_damaged_files_are_refused(symmetries: dict[str, Symmetry], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = drawn(symmetries["mlp"], 0).save(tmp_path / "p.safetensors").read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors cannot be read"):
            Permutation.load(path)
    other = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(3)}, other)
    with pytest.raises(CheckpointError, match="not a file of the form 'isthmus permutation 1' but 'unnamed'"):
        Permutation.load(other)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Permutation.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "metadata", [{}, {"symmetry": "{"}, {"symmetry": "{}"}, {"symmetry": '{"format": "isthmus symmetry 1"}'}]
)
def test_a_file_that_claims_the_form_and_lacks_its_content_is_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "p.safetensors"
    save_file({"0": torch.arange(3)}, path, metadata={"format": "isthmus permutation 1", **metadata})
    with pytest.raises(CheckpointError, match=r"p\.safetensors is damaged"):
        Permutation.load(path)
