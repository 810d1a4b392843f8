"""The noise: Philox known answers, statistics, and the same bits for any threads and instruction set."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import finite_width as fw
from finite_width import _library
from finite_width.bayes import BayesLinear, ops, reference

# Salmon et al.'s known answers (kat_vectors of Random123): counter, key -> result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def noise(count: int, seed: int, sample: int = 0, stream: int = 0) -> Tensor:
    return ops.noise(torch.empty(count), torch.tensor(seed), sample, stream)


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    if _library.COMPILED is not None:
        assert _library.COMPILED.philox4x32_10(words(counter), words(key)) == words(answer)
    c, k = words(counter), words(key)
    block, seed = c[1] << 32 | c[0], k[1] << 32 | k[0]
    as_signed = [value - 2**64 if value >= 2**63 else value for value in (block, seed)]
    # The reference takes the block's high half by an arithmetic shift: real blocks are below 2^63.
    got = reference.philox(torch.tensor(as_signed[0]), torch.tensor(as_signed[1]), c[2], c[3])
    if block < 2**63:
        assert [int(word) for word in got] == words(answer)


def test_noise_is_numbered_as_documented() -> None:
    """Element i from word (i % 64) / 16 of Philox block 16 (i / 64) + i % 16; the words in pairs through Box-Muller."""
    seed, sample, stream = -987654321987654321, 5, 1
    values = noise(200, seed, sample, stream).double()
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for i in (0, 15, 16, 40, 63, 64, 199):
        block = 16 * (i // 64) + i % 16
        if _library.COMPILED is not None:
            word = _library.COMPILED.philox4x32_10([block, 0, sample, stream], key)
        else:
            word = [int(w) for w in reference.philox(torch.tensor(block), torch.tensor(seed), sample, stream)]
        w = i % 64 // 16
        x, y = word[w // 2 * 2], word[w // 2 * 2 + 1]
        low = y & 0x3FFFFFFF
        turns = (y >> 30) + (low - (0x40000000 if low >= 0x20000000 else 0)) / 2**30
        radius = math.sqrt(-2 * math.log((x + 0.5) / 2**32))
        expected = radius * (math.sin if w % 2 else math.cos)(turns * math.pi / 2)
        assert float(values[i]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_moments_and_distribution() -> None:
    n = 1_000_000
    values = noise(n, 11).double()
    assert abs(float(values.mean())) < 4 / math.sqrt(n)
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((values**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    assert abs(float((values**3).mean())) < 4 * math.sqrt(15 / n)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    assert stats.kstest((values**2).numpy(), "chi2", args=(1,)).pvalue > 1e-3
    tail = int((values.abs() > 4).sum())
    expected = n * 2 * stats.norm.sf(4)
    assert abs(tail - expected) < 5 * math.sqrt(expected)


def test_no_correlation_between_elements_samples_streams_and_seeds() -> None:
    n = 200_000
    base = noise(n, 21)
    others = {
        "next seed": noise(n, 22),
        "seed with another high word": noise(n, 21 + 2**32),
        "next sample": noise(n, 21, 1),
        "other stream": noise(n, 21, 0, 1),
        "sample and stream swapped": noise(n, 21, 1, 0),
    }
    for lag in (1, 16, 32, 64):
        others[f"lag {lag}"] = torch.roll(base, lag)
    for name, other in others.items():
        for f in (lambda v: v, lambda v: v**2 - 1):
            correlation = float(np.corrcoef(f(base.double()), f(other.double()))[0, 1])
            assert abs(correlation) < 5 / math.sqrt(n), name
    assert not torch.equal(others["next sample"], others["other stream"])


def test_calls_and_layers_get_fresh_noise() -> None:
    layers = [BayesLinear(300, 300, bias=False, init_std=1.0) for _ in range(2)]
    drawn = []
    for layer in layers:
        torch.nn.init.zeros_(layer.weight_mu)
        drawn += [layer(torch.eye(300)).detach().flatten() for _ in range(3)]
    correlation = np.corrcoef(torch.stack(drawn).double().numpy()) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 5 / 300


def test_a_seed_gives_the_same_network_again() -> None:
    layer, x = BayesLinear(9, 7), torch.randn(4, 9)
    torch.manual_seed(3)
    first = layer(x), layer(x)
    torch.manual_seed(3)
    again = layer(x), layer(x)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


def test_any_element_is_the_same_in_a_smaller_tensor() -> None:
    whole = noise(100_003, 5)
    for count in (1, 63, 64, 65, 16_384, 16_385):
        assert torch.equal(noise(count, 5), whole[:count])


SCRIPT = """
import hashlib, torch
from finite_width.bayes import ops
seed = torch.tensor(77)
generator = torch.Generator().manual_seed(0)
mu, rho, grad = (torch.randn(333, 77, generator=generator) for _ in range(3))
rho = rho * 30
results = [ops.noise(mu, seed, 2, 1)]
mu.requires_grad_(), rho.requires_grad_()
weight, kl = ops.sample(mu, rho, seed, None, 0.7)
results += [weight, kl, *torch.autograd.grad((weight * grad).sum() + 0.3 * kl, (mu, rho))]
print(hashlib.sha256(b"".join(r.detach().numpy().tobytes() for r in results)).hexdigest())
"""


def test_same_bits_for_every_instruction_set() -> None:
    """Noise, sample, KL and both gradients, in processes with the instruction set forced down."""
    if not fw.has_kernels():
        pytest.skip("the promise is the kernels'; the references run on torch's own functions")
    digests = {}
    for isa in ("generic", "avx2", "avx512"):
        environment = {**os.environ, "FINITE_WIDTH_ISA": isa, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests[isa] = done.stdout.strip()
    assert len(set(digests.values())) == 1, digests
    assert len(next(iter(digests.values()))) == hashlib.sha256().digest_size * 2
