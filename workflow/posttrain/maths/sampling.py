"""Draw tokens from a distribution by its cumulative sums, as a pure function.

Shapes: B answers over a vocabulary of V.
"""

import torch
from torch import Tensor

UNITS = 2.0**50  # that a probability of 1 is worth; their sum stays below 2^53, where a float64 counts exactly


def draw_tokens(logits: Tensor, numbers: Tensor) -> Tensor:
    """A token of each row's softmax by inversion (Devroye 1986, section III.2): the first whose cumulative probability
    is over the row's number.

    logits: B x V; numbers: B in float64, uniform in [0, 1). Returns B.

    Probabilities are rounded down to whole units of 2^-50 and added as integers, so that the sums are exact in any
    order, on every device. A token of 0 units adds nothing and is never drawn; a number below 1 never passes the last
    token with a unit. Rounding moves less than V x 2^-50 of the probability, softmax's own in float32 more.
    """
    sums = torch.softmax(logits.float(), dim=-1).mul_(UNITS).long().cumsum_(dim=-1)
    places = (numbers * sums[:, -1]).long()
    tokens = torch.searchsorted(sums, places.unsqueeze(-1), right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)  # logits that are no numbers have no sums
