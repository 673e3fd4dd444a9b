import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch

from isthmus.base.errors import DataError
from isthmus.zoo import load_data
from isthmus.zoo.coarse import SUPERCLASSES, coarsen, pairs_of


def test_each_image_keeps_its_fine_label_beside_the_coarse_one_of_its_group():
    data = load_data("digits")
    found = coarsen(data, [[3, 0, 9], [1], [2, 4, 5, 6, 7, 8]])
    assert found.dataset.classes == ("3+0+9", "1", "2+4+5+6+7+8")
    for coarse, fine in zip(found.dataset.labels.tolist(), found.fine.tolist(), strict=True):
        assert fine in found.groups[coarse]
    assert torch.equal(found.fine, data.labels)
    assert torch.equal(found.dataset.images, data.images)
    assert found.fine_classes == data.classes
    assert "merged" in found.dataset.source


def all_pairings(classes):
    if not classes:
        yield ()
        return
    first, *rest = classes
    for other in rest:
        for others in all_pairings([each for each in rest if each != other]):
            yield ((first, other), *others)


@pytest.mark.parametrize(("pairing", "best"), [("similar", max), ("dissimilar", min)])
def test_pairs_by_likeness_are_the_best_of_all_pairings(pairing, best):
    data = load_data("digits")
    pixels, labels = data.images.flatten(1).double().numpy(), data.labels.numpy()
    means = np.stack([pixels[labels == index].mean(0) for index in range(10)]) - pixels.mean(0)
    cosine = {
        (i, j): means[i] @ means[j] / np.linalg.norm(means[i]) / np.linalg.norm(means[j])
        for i, j in combinations(range(10), 2)
    }
    expected = best(all_pairings(list(range(10))), key=lambda pairs: sum(cosine[pair] for pair in pairs))
    assert pairs_of(data, pairing) == tuple(sorted(expected))


def test_random_pairs_depend_on_the_seed_alone():
    data = load_data("digits")
    drawn = {pairs_of(data, "random", seed=seed) for seed in range(5)}
    assert len(drawn) > 1
    assert pairs_of(data, "random", seed=3) == pairs_of(data, "random", seed=3)
    assert all(sorted(index for pair in pairs for index in pair) == list(range(10)) for pairs in drawn)


def test_labels_dealt_out_at_random_keep_their_numbers_and_forget_the_classes():
    data = load_data("digits")
    plain, control = coarsen(data), coarsen(data, by_sample=True, seed=1)
    assert torch.equal(plain.dataset.labels.bincount(), control.dataset.labels.bincount())
    table = torch.zeros(10, 5).index_put_(
        (control.fine, control.dataset.labels), torch.ones(len(data)), accumulate=True
    )
    assert table.min() > 5  # every class is found under every label
    assert torch.equal(control.dataset.labels, coarsen(data, by_sample=True, seed=1).dataset.labels)
    assert control.groups == (tuple(range(10)),) * 5


@pytest.mark.parametrize("name", SUPERCLASSES)
def test_superclasses_hold_every_class_once(name):
    groups = SUPERCLASSES[name].values()
    assert sorted(index for group in groups for index in group) == list(range(10))


def test_superclasses_have_names():
    assert coarsen(load_data("digits"), "superclasses").dataset.classes == ("even", "odd")


def three_classes():
    data = load_data("digits")
    kept = data.labels < 3
    return dataclasses.replace(data, images=data.images[kept], labels=data.labels[kept], classes=("0", "1", "2"))


@pytest.mark.parametrize(
    ("data", "groups", "message"),
    [
        (load_data("digits"), [[0, 1], [2]], "each of the 10 classes of digits once"),
        (load_data("digits"), [list(range(10)), [3]], "each of the 10 classes of digits once"),
        (load_data("digits"), [list(range(10)), []], "each of the 10 classes of digits once"),
        (load_data("digits"), "similiar", "did you mean similar"),
        (three_classes(), "neighbours", "3 classes, which cannot be paired"),
        (dataclasses.replace(load_data("digits"), name="mine"), "superclasses", "mine has no super-classes"),
        (dataclasses.replace(three_classes(), classes=tuple("0123")), "similar", "no image of class '3'"),
    ],
)
def test_refuses_groups_that_do_not_fit(data, groups, message):
    with pytest.raises(DataError, match=message):
        coarsen(data, groups)
