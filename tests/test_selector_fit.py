"""The branch selector by itself: what it answers, what it refuses, what it costs, its file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from branch_prompts import IDS, NAMES, PROMPTS, RANGES, TEMPLATE, UNKNOWN, fitted, prompt
from manylora.adapter.centroids import Floats, cosines, count_prompts, weigh
from manylora.adapter.selector import BranchSelector


def test_it_finds_the_branch_of_known_prompts_and_minus_one_for_others() -> None:
    selector = fitted()
    unknown = torch.tensor([prompt(*UNKNOWN, 7)])
    x = torch.cat([PROMPTS, unknown])
    assert selector.select(x, torch.ones_like(x)).tolist() == [2, 0, 1, 0, -1]


def test_padding_and_batch_mates_do_not_change_the_choice() -> None:
    selector = fitted()
    x, mask = torch.full((4, 20), 30), torch.zeros(4, 20)
    x[:, 5:17], mask[:, 5:17] = PROMPTS, 1
    assert torch.equal(selector.select(x, mask), IDS)
    for row, k in zip(PROMPTS, IDS, strict=True):
        assert selector.select(row[None], torch.ones(1, 12)).tolist() == [int(k)]


def test_an_answer_is_the_same_bit_for_bit_in_any_batch_and_under_any_number_of_threads() -> None:
    selector, rows = fitted(), [prompt(4, 60, seed, 5 + seed % 40) for seed in range(200)]

    def similarity(some: list[list[int]]) -> Floats:
        features = weigh(count_prompts(some, 512), selector.idf.numpy())
        return cosines(features, selector.mean.numpy(), selector.centroids.numpy())

    together, threads = similarity(rows), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert np.array_equal(similarity(rows), together)
    finally:
        torch.set_num_threads(threads)
    for i, row in enumerate(rows):
        assert np.array_equal(similarity([row])[0], together[i])


def test_the_cosine_is_that_of_features_without_the_mean() -> None:
    selector = fitted()
    features = weigh(count_prompts(PROMPTS.tolist(), 512), selector.idf.numpy())
    found = cosines(features, selector.mean.numpy(), selector.centroids.numpy())
    dense = torch.tensor(features.toarray()) - selector.mean
    assert float(selector.mean.norm()) > 0.1
    expected = dense @ selector.centroids.T / dense.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def test_many_prompts_are_chosen_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.adapter.selector.CHUNK", 3)
    monkeypatch.setattr("manylora.adapter.centroids.CHUNK", 3)
    x, pieces = torch.cat([PROMPTS, PROMPTS]), fitted()
    assert pieces.select(x, torch.ones_like(x)).tolist() == [*IDS.tolist(), *IDS.tolist()]
    monkeypatch.undo()
    assert torch.equal(fitted().centroids, pieces.centroids)
    assert torch.equal(fitted().thresholds, pieces.thresholds)


def test_memory_grows_with_the_tokens_not_with_the_buckets() -> None:
    selector = BranchSelector.fit([[1, 2], [3, 4]], [0, 1], ["a", "b"])
    x = torch.randint(0, 40_000, (16_384, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(x.shape, dtype=torch.bool)
    tracemalloc.start()
    selector.select(x, mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.shape[0] * selector.idf.numel() * 4 / 4  # a dense table, four bytes each


@pytest.mark.parametrize("refuse", [0.01, 0.1])
def test_the_share_of_own_prompts_that_is_refused_is_as_asked(refuse: float) -> None:
    owners = [i for i in range(3) for _ in range(500)]
    short = [seed % 20 == 0 for seed in range(1500)]  # one in twenty: far from a normal spread
    rows = [prompt(*RANGES[i], s, 4 if short[s] else 20) for s, i in enumerate(owners)]
    selector = BranchSelector.fit(rows, owners, NAMES, 512, refuse)
    x = torch.tensor([prompt(*RANGES[i], 10_000 + s, 20) for s, i in enumerate(owners)])
    mask = torch.tensor([[1] * 4 + [0 if is_short else 1] * 16 for is_short in short])
    refused = float((selector.select(x, mask) == -1).float().mean())
    assert refuse / 3 < refused < refuse * 1.7


def test_a_stray_prompt_does_not_open_its_branch_to_everything() -> None:
    owners = [i for i in range(3) for _ in range(200)]
    rows = [prompt(*RANGES[i], seed) for seed, i in enumerate(owners)]
    rows[0] = prompt(*UNKNOWN, 0)
    selector = BranchSelector.fit(rows, owners, NAMES, buckets=512)
    x = torch.tensor([prompt(*UNKNOWN, seed) for seed in range(100, 150)])
    assert selector.select(x, torch.ones_like(x)).tolist() == [-1] * 50


def test_a_branch_of_few_prompts_takes_its_own() -> None:
    rows = [prompt(*RANGES[0], seed) for seed in range(200)]
    few = [prompt(*RANGES[1], seed) for seed in range(4)]
    one = [prompt(*RANGES[2], 0)]
    selector = BranchSelector.fit(rows + few + one, [0] * 200 + [1] * 4 + [2], NAMES, buckets=512)
    assert float(selector.thresholds[2]) == float(selector.thresholds[:2].min())
    for branch in (1, 2):
        x = torch.tensor([prompt(*RANGES[branch], seed) for seed in range(100, 140)])
        chosen = selector.select(x, torch.ones_like(x)).tolist()
        assert set(chosen) <= {branch, -1} and chosen.count(branch) >= 38


def test_a_single_branch_still_tells_its_own_from_others() -> None:
    rows = [prompt(*RANGES[0], seed) for seed in range(50)]
    selector = BranchSelector.fit(rows, [0] * 50, ["law"], buckets=512)
    x = torch.tensor([prompt(*RANGES[0], 99), prompt(*UNKNOWN, 99)])
    assert selector.select(x, torch.ones_like(x)).tolist() == [0, -1]


def test_a_prompt_of_the_template_alone_is_in_no_branch() -> None:
    # Prompts that are all alike, and prompts that have nothing in common: the latter's centroid is
    # little more than "not the former", which the template is too.
    rows = [prompt(4, 6, seed) for seed in range(50)] + [prompt(4, 500, s) for s in range(50, 100)]
    selector = BranchSelector.fit(rows, [0] * 50 + [1] * 50, ["alike", "mixed"])
    x = torch.tensor([TEMPLATE])
    assert selector.select(x, torch.ones_like(x)).tolist() == [-1]


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ValueError, match="no training prompt for medicine, code"):
        BranchSelector.fit([[1, 2]], [0], NAMES)
    with pytest.raises(ValueError, match=r"refuse=1.*from 0 to below 1"):
        BranchSelector.fit([[1, 2]], [0], ["law"], refuse=1)
    mask = torch.ones(4, 12)
    mask[2] = 0
    with pytest.raises(ValueError, match=r"a prompt is empty.*branch_ids\(model, ids\)"):
        fitted().select(PROMPTS, mask)


def test_it_saves_and_loads_equal(tmp_path: Path) -> None:
    selector, file = fitted(), tmp_path / "branch_selector.safetensors"
    selector.save(file)
    loaded = BranchSelector.load(file)
    with safe_open(str(file), "pt") as tensors:
        assert set(tensors.keys()) == {"idf", "mean", "centroids", "thresholds"}
        for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
            assert torch.equal(getattr(loaded, name), getattr(selector, name))
    assert loaded.names == NAMES


def test_a_file_of_another_form_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "branch_selector.safetensors"
    save_file({"idf": torch.ones(8), "threshold": torch.ones(1)}, str(file))
    message = r"selector.safetensors holds idf, threshold, but a selector is .*train again"
    with pytest.raises(ValueError, match=message):
        BranchSelector.load_beside(str(tmp_path), None, None)
