"""`group_by_length`: batches of rows of like length, in transformers' order."""

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from posttrain.config.sections import Sft
from posttrain.dag import campaign
from posttrain.ground.errors import UserError
from posttrain.training.order import Part, in_batches

LENGTHS = np.random.default_rng(0).integers(3, 900, 120)


def padding(numbers, batch_size: int) -> int:
    """Padded tokens of a run's batches."""
    batches = LENGTHS[np.array(numbers)].reshape(-1, batch_size)
    return int((batches.max(axis=1, keepdims=True) - batches).sum())


@pytest.mark.parametrize("batch_size", [4, 6, 12])
def test_a_pass_is_in_transformers_order(batch_size):
    """But for the longest row of all, which transformers puts first."""
    section = Sft(seed=3, steps=120 // batch_size, batch_size=batch_size)
    order = list(in_batches(LENGTHS, section, lengths=LENGTHS).indices)
    theirs = get_length_grouped_indices(list(LENGTHS), batch_size, generator=torch.Generator().manual_seed(3))
    assert sorted(order) == list(range(120)) and sum(map(int.__ne__, order, theirs)) in (0, 2)
    plain = in_batches(LENGTHS, section).indices
    assert padding(order, batch_size) < padding(plain, batch_size), "control"


def test_several_passes_and_a_mixture_read_the_same_rows_as_often():
    section = Sft(seed=0, steps=50, batch_size=7)
    for parts in ((), (Part("a", 100, 0.6, 0.6), Part("b", 20, 0.4, 0.4))):
        plain, order = (in_batches(LENGTHS, section, parts, lengths=lengths).indices for lengths in (None, LENGTHS))
        assert sorted(order) == sorted(plain) and list(order) != list(plain) and len(order) == 350


@pytest.mark.parametrize(
    "sft, said",
    [
        ("group_by_length: true, packing: true", "group_by_length: has no effect with packing"),
        ("group_by_length: true, order: file", "group_by_length: cannot be combined with order: file"),
        ("neftune_alpha: 5, packing: true", "neftune_alpha: cannot be combined with packing"),
    ],
)
def test_what_has_no_effect_is_refused(here, sft, said):
    (here / "config/experiments").mkdir(parents=True)
    (here / "config/config.yaml").write_text("experiments: [one]\n")
    text = "question: Why?\nbase: {scratch: {}}\nprepare: {world: {}}\nsft: {%s}\n"
    (here / "config/experiments/one.yaml").write_text(text % sft)
    with pytest.raises(UserError, match=f"sft.{said}"):
        campaign.load("config/config.yaml")
    (here / "config/experiments/one.yaml").write_text(text % "group_by_length: true, neftune_alpha: 5")
    campaign.load("config/config.yaml")
