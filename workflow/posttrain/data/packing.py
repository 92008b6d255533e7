"""Pack documents into blocks of equal length, and blocks into batches."""

from posttrain.ground.errors import UserError
from posttrain.models import control


def blocks(tokenizer, documents: list[list[int]], context: int, what: str = "the prepared text") -> list[dict]:
    """Concatenated documents (tokens), each ended by EOS, cut into blocks of `context` tokens that begin with BOS.

    A BOS before every document would teach the model to ignore what precedes a BOS, where prefix and prompt tuning put
    their virtual tokens. Raises UserError where the documents do not fill one block. what: the documents' name in it.
    """
    stream: list[int] = []
    for ids in documents:
        stream += [*ids, tokenizer.eos_token_id]
    room = context - 1
    starts = range(0, len(stream) - room + 1, room)
    if not starts:
        raise UserError(f"{what} has {len(stream)} tokens, fewer than one context of {context}")
    return [{"input_ids": [control.opening(tokenizer), *stream[start : start + room]]} for start in starts]


def collate(batch: list[dict]) -> dict:
    """Blocks of equal length as tensors, batch x context; every token is predicted from those before it."""
    import torch

    ids = torch.tensor([block["input_ids"] for block in batch])
    return {"input_ids": ids, "labels": ids.clone()}
