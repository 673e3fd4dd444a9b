"""`verify`: what it measures in float64, what it refuses to vouch for, and what is kept of it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.align import Group, Permutation, Symmetry, Verification, match, symmetry, verify
from isthmus.align.derive import as_example
from isthmus.align.precise import Precise
from isthmus.align.terms import Fixed
from isthmus.base.architecture import full_state
from isthmus.base.errors import ArchitectureError, SymmetryError
from isthmus.merge import merge

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Wrapped(nn.Module):
    """A function between two layers of eight."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


def seeded(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make()


def claimed() -> Symmetry:
    """That the units between the layers of `Wrapped` are free."""
    return symmetry(seeded(lambda: Wrapped(torch.tanh)), X, verify=False)


def wrong() -> tuple[nn.Module, Symmetry]:
    """A network whose second layer looks at its units by number, and the claim that it does not."""
    plain = seeded(lambda: nn.Sequential(*(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))))
    claim = symmetry(plain, X, verify=False)
    numbered = copy.deepcopy(plain)
    numbered[3] = Numbered()
    return numbered, claim


class Numbered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * torch.arange(x.shape[-1]).to(x)


# Precision


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: x.to(torch.float32).tanh().to(x.dtype),
    "float": lambda x: x.float().sin(),
    "half": lambda x: x.half().tanh().double(),
    "bfloat16": lambda x: x.bfloat16().tanh().float().double(),
    "softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype),
    "sum": lambda x: x / x.abs().sum(-1, keepdim=True, dtype=torch.float16),
    "zeros": lambda x: torch.zeros(x.shape, dtype=torch.float32) + x.tanh(),
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.bfloat16) + x.exp().tanh().to(torch.bfloat16),
    "buffer to write in": lambda x: torch.empty(x.shape, dtype=torch.float32).copy_(x.tanh()),
    "full and arange": lambda x: x.tanh() * torch.full((1,), 0.1, dtype=torch.float16) + torch.arange(1.0)[0],
    "constant": lambda x: x @ torch.eye(8) / torch.tensor(3.0),
    "complex": lambda x: (
        torch.view_as_real(torch.fft.fft(x.float().unsqueeze(-1), dim=-1).to(torch.complex64))[..., 0]
        .squeeze(-1)
        .tanh()
    ),
    "autocast": lambda x: autocast(x),
}


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x.unsqueeze(-1) @ torch.ones(1, 1).to(x)).squeeze(-1).tanh()


@pytest.mark.parametrize("name", CASTS)
def test_casts_inside_a_network_do_not_blur_the_measurement(name: str) -> None:
    model = seeded(lambda: Wrapped(CASTS[name]))
    report = claimed().verify(model, X)
    assert report.error < 1e-12
    assert report.passed


@pytest.mark.parametrize("name", CASTS)
def test_a_wrong_claim_about_a_network_that_casts_is_caught(name: str) -> None:
    """A change of one part in ten million: casts alone would make such errors, so that neither could be told apart."""
    tilt = 1 + 1e-7 * torch.arange(8, dtype=torch.float64)
    model = seeded(lambda: Wrapped(lambda x: CASTS[name](x) * tilt.to(x.device)))
    report = claimed().verify(model, X)
    assert report.failing == ("up",)
    assert 1e-8 < report.error < 1e-5


def test_networks_of_any_precision_are_measured_alike() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        model = seeded(lambda: Wrapped(torch.tanh)).to(dtype)
        assert claimed().verify(model, X.to(dtype)).error < 1e-14


def test_precise_computes_as_float64_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    def low(x: Tensor) -> Tensor:
        return (x.float().exp().half().softmax(-1, dtype=torch.float32) @ torch.ones(4, 3)).bfloat16().square().sum()

    expected = (x.exp().softmax(-1) @ torch.ones(4, 3, dtype=torch.float64)).square().sum()
    (slope,) = torch.autograd.grad(expected, x)
    with Precise():
        found = low(x)
        (gradient,) = torch.autograd.grad(found, x)
        bits = torch.tensor([1.0], dtype=torch.float64).view(torch.int64)
        whole = torch.arange(3)
    assert found.dtype == gradient.dtype == torch.float64
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-14)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-12)
    assert bits.tolist() == [0x3FF0000000000000]
    assert whole.dtype == torch.int64
    assert torch.zeros(1).dtype == torch.float32  # nothing stays behind


def test_complex_parameters_are_perturbed_and_compared() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
            self.factor = nn.Parameter(torch.zeros(8, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return self.down((self.up(x).float() * self.factor).abs())

    model = seeded(Spectral)
    found = symmetry(model, X, verify=False)
    assert [(group.size, ("factor", 0) in group.axes) for group in found.groups] == [(8, True)]
    assert found.verify(model, X).check().error < 1e-14
    broken = Symmetry.from_json(found.to_json() | {"layout": found.to_json()["layout"] | {"factor": [8]}})
    assert broken.verify(model, X).failing == ("up",)


# Which groups fail


def test_a_wrong_group_is_named() -> None:
    model, claim = wrong()
    report = claim.verify(model, X)
    assert report.failing == ("2",)
    with pytest.raises(SymmetryError, match="permuting group 2 changes the outputs by"):
        report.check()


@pytest.mark.parametrize("places", [(0,), (17,), (3, 21), (19, 20, 39)])
def test_wrong_groups_among_many_are_named(places: tuple[int, ...]) -> None:
    """Forty layers of four units; those that look at their units by number are the wrong ones."""

    def deep(numbered: tuple[int, ...]) -> nn.Module:
        layers = [nn.Linear(6, 4), *(nn.Linear(4, 4) for _ in range(39)), nn.Linear(4, 2)]
        steps = [
            step for i, layer in enumerate(layers[:-1]) for step in (layer, Slope() if i in numbered else nn.Tanh())
        ]
        return nn.Sequential(*steps, layers[-1])

    class Slope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.tensor([1.0, 0.5, 2.0, 3.0]).to(x)).tanh()

    claim = symmetry(seeded(lambda: deep(())), X, verify=False)
    model = seeded(lambda: deep(places))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # lest what is wrong at the start has faded at the end
    assert claim.verify(model, X).failing == tuple(str(2 * place) for place in places)


# What cannot be measured


def test_a_model_on_the_meta_device_is_refused_before_any_work() -> None:
    with torch.device("meta"):
        model = Wrapped(torch.tanh)
    with pytest.raises(SymmetryError, match=r"the model is on the meta device.*up\.weight.*\(8, 6\).*verify=False"):
        claimed().verify(model, X)


class Dice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(self.up(x).tanh(), 0.5, training=True))


def test_a_network_that_is_random_in_evaluation_mode_is_refused() -> None:
    before = torch.get_rng_state()
    with pytest.raises(SymmetryError, match="Dice is random in evaluation mode; two runs on the same inputs differ by"):
        claimed().verify(seeded(Dice), X)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_in_training_mode_is_switched_off() -> None:
    class Dropped(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(self.up(x).tanh(), 0.5, self.training))

    model = seeded(lambda: Dropped(torch.tanh)).train()
    assert claimed().verify(model, X).passed
    assert model.training


def test_a_network_that_cannot_run_is_refused_with_the_reason() -> None:
    def picky(x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel for this type")

    with pytest.raises(SymmetryError, match=r"Wrapped cannot be run in float64.*no kernel for this type.*verify=False"):
        claimed().verify(seeded(lambda: Wrapped(picky)), X)


def test_an_output_without_tensors_is_refused() -> None:
    with pytest.raises(SymmetryError, match="the output of Boxed, a float, holds no tensor"):
        claimed().verify(seeded(lambda: Boxed(torch.tanh)), X)


class Boxed(Wrapped):
    def forward(self, x: Tensor) -> Any:
        return float(super().forward(x).sum())


def test_nan_under_large_perturbations_is_overcome_by_smaller_ones() -> None:
    """The root of the weights' sum is real only near the given weights."""

    class Root(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (self.down.bias - 0.95).min().sqrt()

    model = seeded(lambda: Root(torch.tanh))
    with torch.no_grad():
        model.down.bias.copy_(torch.tensor([1.0, 1.5, 2.0, 9.0]))
    assert claimed().verify(model, X).passed


def test_nan_with_the_given_weights_is_reported() -> None:
    model = seeded(lambda: Wrapped(lambda x: x.tanh() * float("nan")))
    with pytest.raises(SymmetryError, match="gives NaN, on the example inputs and on noise"):
        claimed().verify(model, X)


def test_a_permutation_that_brings_nan_fails() -> None:
    guard = torch.tensor([0.0, *[1.0] * 7])
    model = seeded(lambda: Wrapped(lambda x: (x + guard.to(x) * 1e3).sqrt()))
    with torch.no_grad():
        model.up.bias[0] = 1e3
    report = claimed().verify(model, X)
    assert report.failing == ("up",)
    assert report.error == math.inf


def test_infinite_outputs_that_are_meant_are_compared_beside_the_others() -> None:
    masked = seeded(lambda: Masked(torch.tanh))
    assert claimed().verify(masked, X).passed
    assert claimed().verify(seeded(lambda: Masked(lambda x: x * torch.arange(8).to(x))), X).failing == ("up",)


class Masked(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)


# Inputs


class Choosy(nn.Module):
    """Takes only what looks like the example: sorted lengths beside numbers from 0 to 1."""

    def __init__(self, exact: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
        self.exact = exact

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if (x < 0).any() or (lengths.diff() < 0).any():
            raise ValueError("not such inputs")
        if self.exact and (lengths != torch.arange(len(lengths))).any():
            raise ValueError("not such lengths")
        return self.down((self.up(x) + lengths[:, None]).tanh())


@pytest.mark.parametrize("exact", [False, True])
def test_a_network_that_refuses_noise_is_measured_on_its_example(exact: bool) -> None:
    inputs = (X.abs(), torch.arange(8))
    model = seeded(lambda: Choosy(exact))
    assert claimed().verify(model, inputs).check().error < 1e-14


def test_a_network_that_takes_no_other_inputs_is_refused_with_its_reason() -> None:
    class Only(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.equal(x, X.to(x)):
                raise ValueError("these and no others")
            return super().forward(x)

    with pytest.raises(SymmetryError, match=r"but on no others of their shapes \(.*these and no others"):
        claimed().verify(seeded(lambda: Only(torch.tanh)), X)


@pytest.mark.parametrize("value", [0, 3])
def test_tokens_that_are_all_alike_are_varied(value: int) -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    tokens = torch.full((2, 3), value)
    assert symmetry(model, tokens, verify=False).verify(model, tokens).passed


def test_inputs_in_nested_structures_are_varied() -> None:
    class Pairs(Wrapped):
        def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> Tensor:  # pyright: ignore
            return super().forward(pair[0] * pair[1]["scale"])

    model, inputs = seeded(lambda: Pairs(torch.tanh)), ((X, {"scale": torch.zeros(())}),)
    assert claimed().verify(model, as_example(inputs)).passed


# Which groups reach the outputs


class InPlace(nn.Module):
    """Keeps a state that it writes in place, so that autograd cannot go back; rescales a weight at its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
        self.rescaled = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if not self.rescaled:
                self.down.weight.div_(2)
                self.rescaled = True
        hidden = self.up(x)
        state = hidden.exp()
        out = state.sigmoid()
        state.mul_(2)
        out.add_(1)
        return self.down(out * state)


def test_a_network_that_writes_in_place_is_measured_without_gradients() -> None:
    model = seeded(InPlace)
    weight = model.down.weight.detach().clone()
    assert claimed().verify(model, X).check().error < 1e-14
    assert torch.equal(model.down.weight, weight)
    assert not model.rescaled


@pytest.mark.parametrize(
    "function",
    [lambda x: (x > 0).to(x), lambda x: x.detach().tanh(), lambda x: (x * 1.5).round()],
    ids=["threshold", "detached", "rounded"],
)
def test_units_that_gradients_do_not_see_are_moved(function: Callable[[Tensor], Tensor]) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = function(self.first(x))
            return self.head(self.second(hidden).tanh())

    model = seeded(Late)
    found = symmetry(model, X, verify=False)
    assert {group.name for group in found.groups} == {"first", "second"}
    assert found.verify(model, X).check().insensitive == ()


def test_no_gradients_at_all() -> None:
    class Guarded(Wrapped):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert claimed().verify(seeded(lambda: Guarded(torch.tanh)), X).passed


def test_an_influence_too_small_to_be_seen_proves_nothing() -> None:
    """Wrong by far, but behind a factor that hides it: the other path makes the network sensitive."""

    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skip, self.side, self.down = nn.Linear(6, 4), nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x) + 1e-14 * self.down(self.side(x).tanh())

    model = seeded(Faint)
    report = symmetry(model, X, verify=False).verify(model, X)
    assert report.error < report.tolerance
    assert report.insensitive == ("side",)
    with pytest.raises(SymmetryError, match="do not depend on group side"):
        report.check()


def test_deep_networks_whose_activations_vanish_are_woken() -> None:
    def vanishing() -> nn.Module:
        blocks = [(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU()) for _ in range(30)]
        net = nn.Sequential(nn.Conv2d(2, 6, 1), *(layer for block in blocks for layer in block), nn.Conv2d(6, 3, 1))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
        return net

    model, x = seeded(vanishing).eval(), torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(x) - model(-x)).abs().max() < 1e-12
    assert symmetry(model, x, verify=False).verify(model, x).check().error < 1e-9


def test_caches_of_weights_do_not_outlive_a_run() -> None:
    class Caching(Wrapped):
        cache: Tensor | None = None

        def train(self, mode: bool = True) -> Any:
            self.cache = None if mode else self.cache
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = self.up.weight * 2
            return self.down(F.linear(x, self.cache).tanh())

    model = seeded(lambda: Caching(torch.tanh)).eval()
    found = dataclasses.replace(claimed(), layout=symmetry(model, X, verify=False).layout)
    assert found.verify(model, X).passed
    model(X)
    kept = model.cache
    assert found.verify(model, X).passed
    assert model.cache is kept


def test_weight_norm_of_the_old_kind_is_measured() -> None:
    with pytest.warns(FutureWarning):
        up = nn.utils.weight_norm(nn.Linear(6, 8))  # pyright: ignore[reportDeprecated]
    model = nn.Sequential(up, nn.Tanh(), nn.Linear(8, 4))
    from isthmus.align.probe import Probe

    assert Probe(model).run(Probe(model).state, as_example(X.double()))[0].dtype == torch.float64


# Several examples and chosen outputs


class Modes(nn.Module):
    """What it computes depends on the number of tokens: one way through is honest, the other is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(hidden * torch.arange(8).to(x) if len(x) > 8 else hidden.tanh())


def test_every_example_is_checked() -> None:
    model, more = seeded(Modes), torch.cat([X, X])
    assert claimed().verify(model, X).passed
    assert verify(claimed(), model, X, also=[more]).failing == ("up",)
    with pytest.raises(SymmetryError, match="permuting group up"):
        claimed().verified(model, X, also=[more])


def test_a_group_must_reach_the_outputs_for_one_example() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = (
                nn.Linear(6, 8),
                nn.Linear(6, 5),
                nn.ModuleList([nn.Linear(8, 4), nn.Linear(5, 4)]),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head[0](self.a(x).tanh()) if len(x) > 8 else self.head[1](self.b(x).tanh())

    model, more = seeded(Either), torch.cat([X, X])
    found = symmetry(model, X, also=[more], verify=False)
    assert {group.name for group in found.groups} == {"a", "b"}
    assert found.verify(model, X).insensitive == ("a",)
    assert found.verify(model, more).insensitive == ("b",)
    assert found.verify(model, X, also=[more]).passed


def test_only_the_outputs_that_a_symmetry_keeps_are_compared(tmp_path: Path) -> None:
    class Two(Wrapped):
        def forward(self, x: Tensor) -> Any:
            return {"scores": super().forward(x), "hidden": self.up(x)}

    model, claim = seeded(lambda: Two(torch.tanh)), claimed()
    assert claim.verify(model, X).failing == ("up",)
    chosen = dataclasses.replace(claim, outputs=("scores",))
    assert chosen.verify(model, X).passed
    assert Symmetry.load(chosen.save(tmp_path / "s.json")).outputs == ("scores",)
    with pytest.raises(SymmetryError, match="there is no output 'score'; did you mean scores"):
        dataclasses.replace(claim, outputs=("score",)).verify(model, X)


# What is kept of it


class Counting(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        RUNS.append(type(x).__name__)
        return super().forward(x)


RUNS: list[str] = []


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module, Symmetry]:
    a, b = (Counting(torch.tanh) for _ in range(2))
    claim = symmetry(a, X, verify=False)
    RUNS.clear()
    return a, b, claim


def test_a_symmetry_is_verified_once(pair: Any) -> None:
    a, b, claim = pair
    assert claim.verification is None
    assert not claim.is_verified
    found = claim.verified(a, X)
    assert found.verification.passed
    assert claim.verification is None
    assert RUNS
    RUNS.clear()
    assert found.verified(a, X) is found
    match(a, b, X, symmetry=found)
    match(a, b, symmetry=found)
    merge([a, b], symmetry=found)
    assert not RUNS


def test_match_and_merge_verify_what_was_not(pair: Any) -> None:
    a, b, claim = pair
    for call in (
        lambda **more: match(a, b, symmetry=claim, **more),
        lambda **more: merge([a, b], symmetry=claim, **more),
    ):
        with pytest.warns(UserWarning, match=r"the symmetry was never verified.*verify=False"):
            call()
        call(verify=False)
        assert not RUNS
    assert match(a, b, X, symmetry=claim).symmetry.is_verified
    assert match(a, b, example_inputs=X, symmetry=claim).symmetry.is_verified
    assert match(a, b, X).symmetry.is_verified
    assert not match(a, b, X, verify=False).symmetry.is_verified
    RUNS.clear()
    merge([a, b, a, b], [X], symmetry=claim)
    once = len(RUNS)
    RUNS.clear()
    claim.verified(a, X)
    assert len(RUNS) == once


def test_match_and_merge_refuse_a_wrong_symmetry_by_name() -> None:
    model, claim = wrong()
    for call in (
        lambda **more: match(model, model, X, symmetry=claim, **more),
        lambda **more: merge([model, model], X, symmetry=claim, **more),
    ):
        with pytest.raises(SymmetryError, match="permuting group 2 changes the outputs"):
            call()
        call(verify=False)


def test_a_failed_verification_is_not_taken_for_one() -> None:
    model, claim = wrong()
    measured = dataclasses.replace(claim, verification=claim.verify(model, X))
    assert not measured.is_verified
    with pytest.raises(SymmetryError, match="permuting group 2"):
        measured.verified(model, X)


def test_a_verified_symmetry_of_another_network_is_refused() -> None:
    model, _ = wrong()
    found = claimed().verified(seeded(lambda: Wrapped(torch.tanh)), X)
    with pytest.raises(ArchitectureError, match="the symmetry and the model are not the same architecture"):
        found.verified(model, X)


def test_the_verification_survives_the_file(tmp_path: Path) -> None:
    found = claimed().verified(seeded(lambda: Wrapped(torch.tanh)), X)
    read = Symmetry.load(found.save(tmp_path / "s.json"))
    assert read.verification == found.verification
    assert read.is_verified
    assert read.to_json() == found.to_json()
    drawn = Permutation.load(read.random().save(tmp_path / "p.safetensors"))
    assert drawn.symmetry.is_verified
    infinite = dataclasses.replace(found, verification=Verification(math.inf, 0.0, (), ("up",)))
    assert Symmetry.load(infinite.save(tmp_path / "s.json")).verification == infinite.verification


def test_files_from_before_verification_was_kept_are_read(tmp_path: Path) -> None:
    claim = claimed()
    old = {key: value for key, value in claim.to_json().items() if key not in ("verification", "outputs")}
    (tmp_path / "old.json").write_text(json.dumps(old))
    read = Symmetry.load(tmp_path / "old.json")
    assert (read.groups, read.verification, read.outputs) == (claim.groups, None, None)


# How many there are


def group(name: str, size: int, *within: str) -> Group:
    return Group(name, size, "within" if within else "free", (), within)


def tables() -> dict[str, tuple[nn.Module, Any, int]]:
    """Small networks, inputs, and the number of their permutations by hand."""
    make = nn.Sequential
    return {
        # 3! orders of the first layer, 2! of the second
        "free": (make(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), torch.ones(2, 2), 12),
        # 2 blocks in 2! orders, in each of the 2 an order of 3 channels of its own
        "blocks": (
            make(nn.Conv2d(1, 6, 1), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(6, 1)),
            torch.randn(2, 1, 1, 1),
            2 * 6**2,
        ),
        # 2 cells of 2 rows of 2: 2! orders of cells, 2!^2 of rows, 2!^4 inside the rows
        "nested": (
            make(nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.Softmax(-1), Rows(), nn.Flatten(), nn.Linear(8, 1)),
            torch.randn(2, 2),
            2 * 2**2 * 2**4,
        ),
        "none": (nn.Linear(2, 2), torch.ones(1, 2), 1),
    }


class Rows(nn.Module):
    """Normalises each cell as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.sum((-1, -2), keepdim=True)


def members(found: Symmetry) -> list[Permutation]:
    """Enumerate the whole symmetry."""
    choices = []
    for g in found.groups:
        outer = [found.by_name[name].size for name in g.within]
        orders = list(itertools.permutations(range(g.size)))
        rows = itertools.product(orders, repeat=math.prod(outer))
        choices.append([torch.tensor(row).reshape(*outer, g.size) for row in rows])
    names = [g.name for g in found.groups]
    return [Permutation(found, dict(zip(names, choice, strict=True))) for choice in itertools.product(*choices)]


def fingerprint(state: dict[str, Tensor]) -> tuple[float, ...]:
    return tuple(torch.cat([tensor.flatten() for tensor in state.values()]).tolist())


@pytest.mark.parametrize("name", list(tables()))
def test_order_counts_the_distinct_permuted_networks(name: str) -> None:
    model, inputs, count = tables()[name]
    found = symmetry(model, inputs, verify=False)
    state = full_state(model)
    distinct = {fingerprint(member.apply(state)) for member in members(found)}
    assert len(distinct) == count
    assert found.order == pytest.approx(math.log(count), abs=1e-12)


def test_order_is_that_of_very_large_groups() -> None:
    found = Symmetry((group("a", 4096), group("b", 10, "a"), group("c", 3, "a", "b")), (), {})
    by_stirling = 4096 * math.log(4096) - 4096 + 0.5 * math.log(2 * math.pi * 4096) + 1 / (12 * 4096)
    assert found.order == pytest.approx(by_stirling + 4096 * math.log(3628800) + 40960 * math.log(6), rel=1e-12)


@pytest.mark.parametrize("name", ["free", "blocks", "nested"])
def test_random_draws_every_member_equally_often(name: str) -> None:
    """With a mean of 50 draws for each, a count is within 6 standard deviations for all but one in 10⁸."""
    model, inputs, count = tables()[name]
    found = symmetry(model, inputs, verify=False)
    state = full_state(model)
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(fingerprint(found.random(generator).apply(state)) for _ in range(50 * count))
    assert set(drawn) == {fingerprint(member.apply(state)) for member in members(found)}
    assert all(abs(times - 50) < 6 * math.sqrt(50) for times in drawn.values())


# Networks that amplify rounding errors


class Chaotic(nn.Module):
    """Each layer doubles what two inputs differ by: in float64, rounding alone grows to 1e-6."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 24), nn.Linear(24, 3)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(depth))
        generator = torch.Generator().manual_seed(depth)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=2 / 24**0.5 if parameter.shape == (24, 24) else 0.2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.sin(layer(x))
        return self.head(x)


def test_amplified_rounding_is_told_from_a_wrong_claim() -> None:
    model = Chaotic(55)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = symmetry(model, x, verify=False)
    report = found.verify(model, x).check()
    assert 1e-8 < report.error <= report.tolerance <= 1e-4
    wrong = dataclasses.replace(found, layout={**found.layout, "layers.50.bias": (Fixed(24),)})
    report = wrong.verify(model, x)
    assert report.error > 0.1
    assert report.failing == ("layers.50",)
