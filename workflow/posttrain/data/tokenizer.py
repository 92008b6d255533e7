"""The tokenizer with its chat template: trained on the text, from a directory, or from the hub."""

from pathlib import Path

from posttrain.config.sections import HubModel, Prepare
from posttrain.data.hub import find_manifest, local_model
from posttrain.ground.errors import UserError
from posttrain.models import tokens


def make_tokenizer(section: Prepare, sides: dict, fetched: list[Path]):
    """The tokenizer of `prepare.tokenizer` with its chat template. Raises UserError where there is none."""
    chosen = section.tokenizer
    assert chosen and section.max_tokens, "filled in when the campaign was read"
    rows = [row for task in ("sft", "preference", "kto") for side in sides[task].values() for row in side]
    conversations = any("messages" in row or not isinstance(row.get("prompt", ""), str) for row in rows)
    if chosen.vocab_size:
        texts = (row["text"] for row in sides["text"]["train"])
        tokenizer = tokens.train_tokenizer(texts, chosen.vocab_size, section.max_tokens)
    else:
        tokenizer = load_tokenizer(chosen.hub, chosen.path, fetched)
    tokens.set_chat_template(tokenizer, section.chat_template, conversations)
    return tokenizer


def load_tokenizer(hub: HubModel | None, path: str | None, fetched: list[Path]):
    """A tokenizer that exists and can end a turn. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    if hub:
        manifest = find_manifest(fetched, "model", hub.id, hub.revision)
        path = str(local_model(hub.id, hub.revision or "main", manifest))
    if path is None or not Path(path).is_dir():
        raise UserError(f"prepare.tokenizer: {path} is not a directory; give the folder of a model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # damaged files make transformers and tokenizers raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"prepare.tokenizer: {path} holds no tokenizer that can be loaded: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"prepare.tokenizer: {path} has no end-of-sequence token, with which every turn and text must end; "
            "name one as `eos_token` in its tokenizer_config.json"
        )
    return tokenizer
