from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.base.errors import DataError
from isthmus.metrics.fingerprints import check_same, fingerprints


def digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def test_integers_are_their_own_fingerprint():
    expected = [3, -1, 2**63 - 1]
    for samples in (expected, tuple(expected), torch.tensor(expected), np.array(expected)):
        prints = fingerprints(samples)
        assert prints.dtype == torch.int64
        assert prints.tolist() == expected
    assert fingerprints(torch.tensor([1, 2], dtype=torch.uint8)).tolist() == [1, 2]
    assert fingerprints(range(3)).tolist() == [0, 1, 2]


def test_a_vector_is_copied():
    samples = torch.arange(3)
    prints = fingerprints(samples)
    samples[0] = 9
    assert prints.tolist() == [0, 1, 2]


def test_strings_and_paths():
    expected = [digest(b"a.png"), digest("é".encode())]
    assert fingerprints(["a.png", "é"]).tolist() == expected
    assert fingerprints(np.array(["a.png", "é"])).tolist() == expected
    assert fingerprints([Path("a.png"), b"a.png"]).tolist() == [expected[0]] * 2


def test_inputs_are_told_by_their_content():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = [digest(row.numpy().tobytes()) for row in x]
    assert fingerprints(x).tolist() == expected
    assert fingerprints(x.numpy()).tolist() == expected
    assert fingerprints(list(x)).tolist() == expected
    assert fingerprints([row.numpy() for row in x]).tolist() == expected
    assert fingerprints(x.transpose(1, 2).contiguous().transpose(1, 2)).tolist() == expected, "whatever the strides"
    assert fingerprints(x.bfloat16())[0] != expected[0]
    assert len(fingerprints(torch.randn(5))) == 5
    assert fingerprints([0.5]).tolist() == [digest(np.float64(0.5).tobytes())]
    tokens = torch.arange(6).view(2, 3)
    assert fingerprints(tokens).tolist() == [digest(row.numpy().tobytes()) for row in tokens]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.tensor(3), r"shape \(\)"),
        (torch.empty(0, 3), r"shape \(0, 3\)"),
        ([], "expected identities or inputs"),
        ("abc", "is str 'abc'"),
        (7, "is int 7"),
        ([None], "a sample is a NoneType None"),
        ([2**63], "a sample is a int 9223372036854775808"),
    ],
)
def test_what_tells_no_samples(samples, message):
    with pytest.raises(DataError, match=message):
        fingerprints(samples)


def test_the_first_difference_is_named():
    check_same(torch.tensor([1, 2]), torch.tensor([1, 2]), "a", "b")
    with pytest.raises(DataError, match="saw different samples: sample 1 is 2 in one and 3 in the other, 1 of 2"):
        check_same(torch.tensor([1, 2]), torch.tensor([1, 3]), "a", "b")
    with pytest.raises(DataError, match="a has seen 2 samples, b 1"):
        check_same(torch.tensor([1, 2]), torch.tensor([1]), "a", "b")
