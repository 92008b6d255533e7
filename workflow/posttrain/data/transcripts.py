"""Conversations that are written as one text: with `Human:` after a blank line, with `### Human:`, or as ChatML."""

import re

from posttrain.data.formats import check_conversation, read_messages, required
from posttrain.data.lines import RowError, json_kind

# Each form's beginning of a turn, with the speaker's name as a group.
FORMS = {
    "Human:": re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):"),
    "### Human:": re.compile(r"###[ \t]*(System|Human|User|Assistant):"),
    "<|im_start|>": re.compile(r"<\|im_start\|>[ \t]*(system|user|assistant|tool)[ \t]*(?:\r?\n|\Z)"),
}
BEGINNING = re.compile(r"\s*(?:(Human:)|(###[ \t]*(?:System|Human|User):)|(<\|im_start\|>))")
ROLES = {"human": "user", "user": "user", "assistant": "assistant", "system": "system", "tool": "tool"}
CHATML_END = "<|im_end|>"


def transcript(row: dict, allow_empty_user: bool) -> dict:
    """A conversation as one text."""
    text = row.get("transcript") or required(row, "text")
    return {"messages": check_conversation(read_transcript(text, "text", allow_empty_user), "text")}


def form_of(value) -> str | None:
    """The form, a key of FORMS, of which a text begins with a user's or system turn; None for any other value."""
    match = BEGINNING.match(value) if isinstance(value, str) else None
    return list(FORMS)[match.lastindex - 1] if match and match.lastindex else None


def read_transcript(text, where: str, allow_empty_user: bool) -> list[dict]:
    """The turns of a text, without outer white space. The last turn of ChatML may lack its end. Raises RowError."""
    if not isinstance(text, str):
        raise RowError("mixed_types", f"{where} is {json_kind(text)} while the file holds transcripts")
    form = form_of(text) or "Human:"
    lead, *parts = FORMS[form].split(text)
    if lead.strip() or not parts:
        raise RowError("not_a_transcript", f"{where} must begin with {form} or Assistant:")
    speeches = list(zip(parts[::2], parts[1::2], strict=True))
    if form == "<|im_start|>":
        speeches[-1] = (speeches[-1][0], speeches[-1][1].strip().removesuffix(CHATML_END) + CHATML_END)
        speeches = [(speaker, _ended(speech, where)) for speaker, speech in speeches]
    turns = [{"role": ROLES[speaker.lower()], "content": speech.strip()} for speaker, speech in speeches]
    return read_messages(turns, where, allow_empty_user)


def _ended(speech: str, where: str) -> str:
    """What stands before a turn's end in ChatML. Raises RowError where the end is missing or something follows it."""
    before, end, after = speech.partition(CHATML_END)
    if not end or after.strip():
        fault = f"text after {CHATML_END}" if end else f"a turn without {CHATML_END}"
        raise RowError("not_a_transcript", f"{where}: {fault}: not ChatML")
    return before
