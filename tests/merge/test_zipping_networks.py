import copy
from typing import Any

import pytest
import torch
from torch import nn

from isthmus import zoo
from isthmus.align import symmetry
from isthmus.base.errors import ArchitectureError, CheckpointError, DataError, LayerNotFoundError, NotFiniteError
from isthmus.merge.zipping import Zipped, task_accuracy, zip_networks

CLASSES = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def _inputs(*shape, seed=0):
    return torch.randn(*shape, generator=_seeded(seed))


def _mlp(seed=0, classes=5, widths=(12, 10)) -> Any:
    return zoo.mlp(16, widths, classes=classes, seed=seed).eval()


def _calibrated(model, x):
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(x)
    return model.eval()


def _vgg(seed=0) -> Any:
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)]
    torch.manual_seed(seed)
    return _calibrated(nn.Sequential(*layers), _inputs(64, 1, 8, 8))


def _resnet(shortcut, seed=0) -> Any:
    return _calibrated(zoo.resnet(8, in_channels=1, classes=5, shortcut=shortcut, seed=seed), _inputs(32, 1, 8, 8))


@pytest.fixture(scope="module", params=["mlp", "resnet-conv", "resnet-pad"])
def case(request):
    """A network, inputs, and layers up to which it can be zipped."""
    if request.param == "mlp":
        return _mlp(), _inputs(64, 16), [None, "fc1", "relu1", "fc2"]
    upto = [None, "bn1", "layer2", "flatten"] if request.param == "resnet-conv" else ["layer1", "layer2"]
    return _resnet(request.param[7:]), _inputs(8, 1, 8, 8), upto


def _task(zipped, index) -> Any:
    return zipped.task(index)


def _close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_network_zipped_with_itself_is_itself(case):
    model, x, layers = case
    found = symmetry(model, x)
    with torch.no_grad():
        for upto in layers:
            zipped = zip_networks([model, model], x, upto=upto, repair=None, symmetry=found)
            assert all(torch.equal(output, model(x)) for output in zipped.outputs(x))
            assert {group.how for group in zipped.groups} == {"zip"}
            assert all(group.across == 1.0 for group in zipped.groups)


def test_a_permuted_copy_is_zipped_without_loss(case):
    model, x, layers = case
    found = symmetry(model, x)
    other = found.random(_seeded(1)).apply(model)
    with torch.no_grad():
        for upto in layers:
            for how in ("zip", "permute"):
                zipped = zip_networks([model, other], x, upto=upto, how=how, repair=None, symmetry=found)
                for output in zipped.outputs(x):
                    _close(output, model(x))
        worse = zip_networks([model, other], x, upto=layers[-1], how="mean", repair=None, symmetry=found)
        assert float((_task(worse, 0)(x) - model(x)).abs().max()) > 0.05 * float(model(x).abs().max())


def test_three_permuted_copies(case):
    model, x, layers = case
    found = symmetry(model, x)
    others = [found.random(_seeded(seed)).apply(model) for seed in (1, 2)]
    zipped = zip_networks([model, *others], x, upto=layers[-2], repair=None, symmetry=found, penalty=1.0)
    with torch.no_grad():
        for output in zipped.outputs(x):
            _close(output, model(x))


def _planted(own, shared, duplicated):
    """Give a layer's units: of its own, shared with the other network, and copies of its own, in one order."""
    return torch.cat([own, shared, own[duplicated]])


def test_duplicates_within_networks_make_room_for_units_that_are_not_shared():
    units = [_inputs(3, 8, seed=seed) for seed in range(3)]
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model: Any = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4))
        with torch.no_grad():
            model[0].weight.copy_(_planted(units[seed], units[2], [0, 1, 2]))
            model[0].bias.copy_(model[0].weight.sum(1))
        models.append(model)
    x = _inputs(200, 8, seed=9)
    zipped = zip_networks(models, x, upto="1", repair=None)
    with torch.no_grad():
        for output, model in zip(zipped.outputs(x), models, strict=True):
            _close(output, model(x))
    permuted = zip_networks(models, x, upto="1", how="permute", repair=None)
    with torch.no_grad():
        lost = [float((a - m(x)).norm() / m(x).norm()) for a, m in zip(permuted.outputs(x), models, strict=True)]
    assert min(lost) > 0.1
    (group,) = zipped.groups
    assert group.across == pytest.approx(1 / 3)
    assert group.correlation == pytest.approx(1.0)


def test_a_trunk_that_is_merged_is_the_product_with_the_dense_matrices():
    a, b, x = _mlp(0), _mlp(1), _inputs(100, 16)
    zipped = zip_networks([a, b], x, upto="relu1", repair=None)
    with torch.no_grad():
        # slots read off the head: a column of zeros where no unit of the network is
        hidden = torch.cat([a[1](x.flatten(1)), b[1](x.flatten(1))], 1).relu().double()
        correlation = torch.corrcoef(hidden.T)
        best = float(correlation.fill_diagonal_(-1).max())
        assert max(group.correlation or 0.0 for group in zipped.groups) <= best
        merged = _task(zipped, 0).fc1.weight
        rows = torch.cat([a.fc1.weight, b.fc1.weight])
        pairs = {
            (i, j) for row in merged for i in range(24) for j in range(i) if torch.allclose(rows[[i, j]].mean(0), row)
        }
        assert len(pairs) == 12
        assert len({unit for pair in pairs for unit in pair}) == 24


def test_heads_may_differ_in_their_classes():
    a, b, x = _mlp(0, classes=4), _mlp(1, classes=6), _inputs(64, 16)
    classes = [[0, 2, 4, 6], [1, 3, 5, 7, 8, 9]]
    for how in ("zip", "permute", "mean"):
        zipped = zip_networks([a, b], x, upto="relu2", how=how, classes=classes)
        assert zipped(x).shape == (64, 10)
        assert torch.equal(zipped(x)[:, classes[1]], _task(zipped, 1)(x))
        assert torch.equal(zipped(x)[:, classes[0]], _task(zipped, 0)(x))
    with pytest.raises(ArchitectureError, match=r"fc3\.weight"):
        zip_networks([a, b], x)


def test_the_trunk_is_shared_and_computed_once():
    a, b, x = _resnet("conv", 0), _resnet("conv", 1), _inputs(16, 1, 8, 8)
    zipped = zip_networks([a, b], x, upto="layer1")
    calls = []
    handle = _task(zipped, 0).conv1.register_forward_hook(lambda *_: calls.append("conv1"))
    _task(zipped, 0).layer1[0].conv2.register_forward_hook(lambda *_: calls.append("conv2"))
    with torch.no_grad():
        outputs = zipped.outputs(x)
        assert calls.count("conv2") == 1
        handle.remove()
        for output, head in zip(outputs, zipped.heads, strict=True):
            assert torch.equal(output, head(x))
    assert _task(zipped, 0).layer1 is _task(zipped, 1).layer1
    assert _task(zipped, 0).layer2 is not _task(zipped, 1).layer2
    assert type(_task(zipped, 1)) is type(a)
    assert "forward" not in vars(_task(zipped, 0).layer1)
    counted = {id(p): p.numel() for head in zipped.heads for p in head.parameters()}
    assert zipped.parameter_count == sum(counted.values()) < sum(zipped.parents)
    assert zipped.parents == (sum(p.numel() for p in a.parameters()),) * 2


def test_gradients_reach_what_is_shared_from_every_head():
    zipped = zip_networks([_mlp(0), _mlp(1)], _inputs(64, 16), upto="relu1")
    zipped.outputs(_inputs(8, 16))[1].sum().backward()
    assert _task(zipped, 0).fc1.weight.grad is not None
    assert _task(zipped, 0).fc2.weight.grad is None


def test_heads_that_work_in_place_do_not_spoil_each_other():
    def make(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))

    x = _inputs(32, 4)
    kept = x.clone()
    zipped = zip_networks([make(0), make(1)], x, upto="1")
    with torch.no_grad():
        for output, head in zip(zipped.outputs(x), zipped.heads, strict=True):
            assert torch.equal(output, head(kept.clone()))
    assert torch.equal(x, kept)


def test_the_parents_stay_as_they_are():
    a, b, x = _resnet("conv", 0), _resnet("conv", 1), _inputs(16, 1, 8, 8)
    b.train()
    before = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    zip_networks([a, b], x, upto="layer2")
    with pytest.raises(LayerNotFoundError):
        zip_networks([a, b], x, upto="layer9")
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert b.training
    assert not a.training


def test_the_same_data_give_the_same_bits():
    models, x = [_mlp(0), _mlp(1)], _inputs(64, 16)
    first, second = (zip_networks(models, [x[:40], x[40:]], upto="relu2") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_batch_norms_are_measured_anew():
    a, b, x = _resnet("conv", 0), _resnet("conv", 1), _inputs(64, 1, 8, 8)
    zipped = zip_networks([a, b], x, upto="layer1")
    seen = {}
    for number, head in enumerate(zipped.heads):
        for name in ("bn1", "layer2.0.bn1"):
            head.get_submodule(name).register_forward_pre_hook(
                lambda _, args, key=(number, name): seen.__setitem__(key, args[0].detach())
            )
    with torch.no_grad():
        for head in zipped.heads:
            head(x)
    for (number, name), values in seen.items():
        norm = _task(zipped, number).get_submodule(name)
        torch.testing.assert_close(norm.running_mean, values.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, values.transpose(0, 1).flatten(1).var(1), rtol=1e-3, atol=1e-4)


def test_units_of_trunk_and_heads_get_their_parents_statistics():
    a, b, x = _mlp(0), _mlp(1), _inputs(256, 16)
    zipped = zip_networks([a, b], x, upto="relu1", how="mean")
    with torch.no_grad():
        flat = x.flatten(1)
        wanted = [model[1](flat) for model in (a, b)]
        found = _task(zipped, 0).fc1(flat)
        torch.testing.assert_close(found.std(0), (wanted[0].std(0) + wanted[1].std(0)) / 2, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.mean(0), (wanted[0].mean(0) + wanted[1].mean(0)) / 2, rtol=1e-3, atol=1e-4)
        for number, parent in enumerate((a, b)):
            inside, own = _task(zipped, number)[:4](x), parent[:4](x)
            torch.testing.assert_close(inside.std(0), own.std(0), rtol=1e-3, atol=1e-4)
    everything = zip_networks([a, b], x)
    assert len(everything.heads) == 1
    assert everything(x).shape == (256, 5)


def test_repair_of_a_trunk_that_is_the_last_hidden_layer_leaves_heads_alone():
    a, b, x = _mlp(0), _mlp(1), _inputs(64, 16)
    plain, mended = (zip_networks([a, b], x, upto="relu2", repair=repair) for repair in (None, "rescale"))
    for index in (0, 1):
        assert torch.equal(_task(plain, index).fc3.weight, _task(mended, index).fc3.weight)
    assert not torch.equal(_task(plain, 1).fc2.weight, _task(mended, 1).fc2.weight)


class _Residual(nn.Module):
    """A stream that goes around the layer in the middle."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.leave = nn.Linear(6, 2)

    def forward(self, x):
        x = self.enter(x).relu()
        return self.leave(x + self.outer(self.inner(x).relu()))


def test_a_boundary_that_a_stream_goes_around_is_refused():
    with pytest.raises(ArchitectureError, match=r"enter go on behind inner, as outer.weight writes to them"):
        zip_networks([_Residual(), _Residual()], _inputs(32, 4), upto="inner")
    zipped = zip_networks([_Residual(), _Residual()], _inputs(32, 4), upto="outer")
    assert len(zipped.groups) == 2


class _Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return self.layer(x), x


class _Parts(nn.Module):
    """A layer that gives two tensors, and what reads them."""

    def __init__(self, around=False):
        super().__init__()
        self.first, self.last = _Both(), nn.Linear(6, 2)
        self.middle = nn.Linear(6, 6)
        self.around = nn.Linear(6, 3) if around else None

    def forward(self, x):
        y, _ = self.first(x)
        z = self.middle(y.relu())
        return self.last(z) if self.around is None else self.around(z + y)


def test_a_layer_that_gives_several_tensors_may_be_the_last():
    torch.manual_seed(0)
    model, x = _Parts(), _inputs(32, 4)
    other = symmetry(model, x).random(_seeded(1)).apply(model)
    zipped = zip_networks([model, other], x, upto="first", repair=None)
    with torch.no_grad():
        for output in zipped.outputs(x):
            _close(output, model(x))


def test_trunks_whose_units_are_tied_otherwise_are_refused():
    with pytest.raises(ArchitectureError, match="its units are tied to others in network 1 than in network 0"):
        zip_networks([_Parts(), _Parts(around=True)], _inputs(32, 4), upto="middle")


def test_a_forward_of_its_own_is_kept_by_a_module():
    a, b, x = _mlp(0), _mlp(1), _inputs(32, 16)
    for model in (a, b):
        model.relu1.forward = torch.relu
    zipped = zip_networks([a, b], x, upto="relu1")
    with torch.no_grad():
        for output, head in zip(zipped.outputs(x), zipped.heads, strict=True):
            assert torch.equal(output, head(x))
    assert vars(_task(zipped, 0).relu1)["forward"] is torch.relu


class _Twice(nn.Module):
    """The stream is the layer's output, and is read once more behind the next one."""

    def __init__(self, late=False):
        super().__init__()
        self.enter, self.inner = nn.Linear(4, 6), nn.Linear(6, 6)
        self.norm, self.leave = nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.enter(x)
        y = self.inner(x)
        return self.leave(self.norm(y + x))


def test_a_boundary_that_the_stream_crosses_twice_is_refused_by_measurement():
    with pytest.raises(ArchitectureError, match="in more ways than one"):
        zip_networks([_Twice(), _Twice()], _inputs(32, 4), upto="inner")


class _Normed(nn.Module):
    """Units that a layer norm reads together, beside some that it does not."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.second, self.third = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.third(self.second(self.norm(self.first(x))).relu())


def test_units_that_act_on_each_other_are_matched_one_to_one():
    torch.manual_seed(0)
    model, x = _Normed(), _inputs(64, 4)
    found = symmetry(model, x)
    other = found.random(_seeded(3)).apply(model)
    zipped = zip_networks([model, other], x, upto="second", repair=None)
    how = {group.name: (group.how, group.reason or "") for group in zipped.groups}
    assert how["second"] == ("zip", "")
    assert how["first"][0] == "permute"
    assert how["first"][1].startswith("measured: its units act on each other")
    with torch.no_grad():
        for output in zipped.outputs(x):
            _close(output, model(x))


def test_grouped_convolutions_are_matched_and_depthwise_ones_zipped():
    model, x = _vgg(), _inputs(64, 1, 8, 8)
    found = symmetry(model, x)
    other = found.random(_seeded(2)).apply(model)
    zipped = zip_networks([model, other], x, upto="7", repair=None, symmetry=found)
    assert {group.how for group in zipped.groups} >= {"permute"}
    assert all(group.reason for group in zipped.groups if group.how == "permute")
    with torch.no_grad():
        for output in zipped.outputs(x):
            _close(output, model(x))


def test_transposed_convolutions_and_embeddings():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 5, 2), nn.ReLU(), nn.ConvTranspose2d(5, 4, 2), nn.PReLU(4), nn.Conv2d(4, 2, 1))
    x = _inputs(32, 1, 5, 5)
    words = nn.Sequential(nn.Embedding(11, 6), nn.Tanh(), nn.Linear(6, 3))
    tokens = torch.randint(11, (40, 5), generator=_seeded(0))
    for net, data, upto in ((model, x, "3"), (words, tokens, "0")):
        found = symmetry(net, data)
        other = found.random(_seeded(4)).apply(net)
        zipped = zip_networks([net, other], [data], upto=upto, repair=None, symmetry=found)
        assert {group.how for group in zipped.groups} == {"zip"}
        with torch.no_grad():
            for output in zipped.outputs(data):
                _close(output, net(data))


def test_attention_is_matched_head_by_head():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    model, x = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2)), _inputs(64, 3, 8)
    found = symmetry(model, x)
    other = found.random(_seeded(5)).apply(model)
    zipped = zip_networks([model, other], x, upto="0", repair=None, symmetry=found)
    assert {group.how for group in zipped.groups} == {"zip", "permute"}
    assert any("an order inside or around" in group.reason for group in zipped.groups if group.reason)
    mended = zip_networks([model, other], x, upto="0", repair="rescale", symmetry=found)
    with torch.no_grad():
        for output in mended.outputs(x):
            torch.testing.assert_close(output, model(x), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for output in zipped.outputs(x):
            _close(output, model(x))


def test_tied_weights_that_read_and_write_are_not_zipped():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.encode(x).tanh())

    tokens = torch.randint(7, (30, 4), generator=_seeded(0))
    torch.manual_seed(0)
    model = Tied()
    zipped = zip_networks([model, symmetry(model, tokens).random(_seeded(1)).apply(model)], [tokens], repair=None)
    (group,) = zipped.groups
    assert group.how == "permute"
    assert group.reason
    assert "are one tensor, which reads in one place and writes in another" in group.reason
    with pytest.raises(ArchitectureError, match="one parameter, which is used before and after"):
        zip_networks([model, Tied()], [tokens], upto="encode", repair=None)


def test_saved_and_loaded(tmp_path):
    for models, x, upto in (
        ([_mlp(0, 4), _mlp(1, 6)], _inputs(64, 16), "relu1"),
        ([_resnet("pad", 0), _resnet("pad", 1)], _inputs(16, 1, 8, 8), "layer1"),
    ):
        outputs = [model(x).shape[1] for model in models]
        classes = [list(range(outputs[0])), list(range(outputs[0], sum(outputs)))]
        zipped = zip_networks(models, x, upto=upto, classes=classes)
        path = zipped.save(tmp_path / "zipped.safetensors")
        back = Zipped.load(path, models)
        with torch.no_grad():
            assert torch.equal(back.eval()(x), zipped.eval()(x))
        assert back.parameter_count == zipped.parameter_count
        assert back.groups == zipped.groups
        assert back.upto == upto
        assert back.parents == zipped.parents
        assert path.stat().st_size < 1.2 * 4 * sum(zipped.parents)
        with pytest.raises(ArchitectureError, match="2 heads, and 1 models"):
            Zipped.load(path, models[:1])
        with pytest.raises(ArchitectureError, match=r"fc3|linear"):
            Zipped.load(
                path, [copy.deepcopy(models[0]), _mlp(0, 9) if upto == "relu1" else zoo.resnet(8, in_channels=1)]
            )


def test_files_that_hold_something_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    zipped = zip_networks([_mlp(0), _mlp(1)], _inputs(64, 16), upto="relu1")
    with pytest.raises(CheckpointError, match="safetensors"):
        zipped.save(tmp_path / "zipped.pt")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds no zipped networks"):
        Zipped.load(tmp_path / "a.safetensors", [_mlp()])
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors", metadata={"zipped": '{"format": "other"}'})
    with pytest.raises(CheckpointError, match="holds no zipped networks"):
        Zipped.load(tmp_path / "b.safetensors", [_mlp()])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"upto": "relu9"}, LayerNotFoundError, "did you mean relu"),
        ({"upto": ""}, LayerNotFoundError, "no layer"),
        ({"upto": "flatten"}, ArchitectureError, "nothing to merge"),
        ({"how": "zipp"}, DataError, "did you mean zip"),
        ({"within": 2.0}, DataError, "within is 2.0"),
        ({"penalty": -1.0}, DataError, "penalty is -1.0"),
        ({"upto": "relu1", "classes": [[0, 1]]}, DataError, "1 lists for 2 heads"),
        ({"upto": "relu1", "classes": [[0, 0], [1]]}, DataError, "different numbers"),
        ({"repair": "mend"}, DataError, "mend"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        zip_networks([_mlp(0), _mlp(1)], _inputs(32, 16), **options)


def test_bad_networks_and_data_are_refused():
    a, x = _mlp(0), _inputs(32, 16)
    with pytest.raises(DataError, match="two networks or more"):
        zip_networks([a], x)
    with pytest.raises(DataError, match="no batch"):
        zip_networks([a, _mlp(1)], [])
    with pytest.raises(DataError, match="iterator"):
        zip_networks([a, _mlp(1)], iter([x]))
    with pytest.raises(ArchitectureError, match=r"fc1.weight: \(12, 16\) in network 0, \(9, 16\) in network 1"):
        zip_networks([a, _mlp(1, widths=(9, 10))], x, upto="relu1")
    broken = _mlp(1)
    broken.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"network 1: fc1\.weight"):
        zip_networks([a, broken], x)
    with pytest.raises(DataError, match="task 2"):
        zip_networks([a, _mlp(1)], x, upto="relu1").task(2)


def test_layers_that_do_not_run_once_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.spare, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.act = nn.ReLU()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.last(self.act(self.first(self.act(self.first(x)))) * self.scale)

    x = _inputs(8, 4)
    with pytest.raises(ArchitectureError, match="runs 2 times"):
        zip_networks([Odd(), Odd()], x, upto="act")
    with pytest.raises(LayerNotFoundError, match="does not run"):
        zip_networks([Odd(), Odd()], x, upto="spare")
    with pytest.raises(ArchitectureError, match="belongs to the network itself"):
        zip_networks([Odd(), Odd()], x, upto="last")


def test_accuracies_are_those_of_a_plain_count():
    a, b, x = _mlp(0), _mlp(1), _inputs(200, 16)
    y = torch.randint(10, (200,), generator=_seeded(0))
    logits = torch.cat([a(x), b(x)], 1)
    found = task_accuracy([a, b], [(x[:150], y[:150]), (x[150:], y[150:])], CLASSES)
    assert found.joint == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    first = y < 5
    assert found.tasks[0] == pytest.approx(float((a(x)[first].argmax(1) == y[first]).double().mean()))
    assert found.tasks[1] == pytest.approx(float((b(x)[~first].argmax(1) + 5 == y[~first]).double().mean()))
    assert found.samples == (int(first.sum()), int((~first).sum()))
    assert found.mean == pytest.approx(sum(found.tasks) / 2)
    zipped = zip_networks([a, b], x, upto="relu1", classes=CLASSES)
    assert task_accuracy(zipped, (x, y)) == task_accuracy(list(zipped.heads), (x, y), CLASSES)


def test_accuracies_need_labels_of_the_tasks():
    a, b, x = _mlp(0), _mlp(1), _inputs(10, 16)
    zeros = torch.zeros(10, dtype=torch.int64)
    for data, classes, message in (
        (x, CLASSES, "labels are none"),
        ((x, zeros + 11), CLASSES, "label 11 is a class of no task"),
        ((x, zeros), CLASSES, "no sample has a class of task 1"),
        ((x, zeros), None, "which classes are whose"),
        ((x, zeros), [[0, 1], [2, 3]], r"of shape \(10, 5\), and classes\[0\] names 2"),
        ((x, zeros.float()), CLASSES, "torch.float32"),
    ):
        with pytest.raises(DataError, match=message):
            task_accuracy([a, b], data, classes)


def test_outputs_that_are_no_tensor_cannot_be_joined():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x), x

    zipped = Zipped([Pair(), Pair()], classes=[[0], [1]])
    with pytest.raises(DataError, match="head 0 gives a tuple"):
        zipped(_inputs(2, 4))


def test_tasks_of_digits_keep_their_accuracy_when_zipped():
    from dataclasses import replace

    train = zoo.load_data("digits")
    test = zoo.load_data("digits", "test")
    models = []
    for seed, own in enumerate(CLASSES):
        keep = torch.isin(train.labels, torch.tensor(own))
        data = replace(train, images=train.images[keep], labels=train.labels[keep] - own[0], classes=train.classes[:5])
        model = zoo.mlp(64, (48,), classes=5, seed=seed)
        zoo.train(model, data, zoo.Recipe(epochs=8, lr=0.1, weight_decay=0.0, seed=seed), progress=False)
        models.append(model.eval())
    seen, held = list(zoo.loader(train, 500)), list(zoo.loader(test, 500))
    parents = task_accuracy(models, held, CLASSES)
    found = {
        how: task_accuracy(zip_networks(models, seen, upto="relu1", how=how, classes=CLASSES), held)
        for how in ("zip", "permute")
    }
    assert min(parents.tasks) > 0.95
    assert found["zip"].mean > parents.mean - 0.05
    assert found["zip"].joint > found["permute"].joint
