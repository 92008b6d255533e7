"""The texts of a row, their words and odd characters; rows with equal texts, and test rows that overlap with training
rows. Nothing here changes a text."""

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from typing import NamedTuple

from posttrain.data.examples import question_asked
from posttrain.models.tokens import prompt_text, spoken, turn_text

DERIVED = re.compile(r"prompt:[0-9a-f]{32}")  # the group of a row that declares none
FEWEST_ASKED = 5  # words of a prompt from which an equal prompt is a finding: "Tell me a joke" is not
FEWEST_CONTAINED = 8  # words of a prompt from which it is searched in other texts
GRAM = 13  # consecutive words that two texts share by copying, hardly by chance (Brown et al. 2020, appendix C)
COMMON = 10  # training prompts beyond which a short prompt or a gram is boilerplate (ibid.)
COVERED = 0.5  # share of a test prompt's words in shared grams from which it is a finding
# The bytes 80-BF decoded as cp1252. After a capital, quotes and dashes do not count: they may end a word.
_FOLLOWS = bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "\u0080-\u009f"
_AFTER_A = re.sub("[\u2013\u2014\u2018\u2019\u201c\u201d\u2026]", "", _FOLLOWS)
ODD = {
    # Joiners (U+200C, U+200D) and direction marks are left out: emoji, Persian, Hebrew and Arabic need them.
    "zero_width": re.compile("[\u200b\u2060\ufeff\u00ad]"),
    "bidi_override": re.compile("[\u202a-\u202e\u2066-\u2069]"),
    "mojibake": re.compile(
        f"â€[{_FOLLOWS}]|Ã[{_AFTER_A}]|Â[\u00a0-\u00bf]|ðŸ[{_FOLLOWS}]|ï¿½|ï»¿|(?:[ÐÑ][{_FOLLOWS}]){{2}}|\ufffd"
    ),
    "control_character": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    "special_token": re.compile(r"<\|[a-z0-9_]+\|>|</s>|\[/?INST\]|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"),
}
ODD_MEANING = {
    "zero_width": "zero-width characters, kept",
    "bidi_override": "bidi override characters (such as U+202E), kept: the text is not what it looks like",
    "mojibake": "likely mojibake (UTF-8 once read as something else), kept",
    "control_character": "control characters, kept",
    "special_token": "text that looks like a tokenizer's special token",
}
_INVISIBLE = set("\u115f\u1160\u2800\u3164\uffa0")
# In scripts without spaces, each character is a word. Sentence punctuation is not a word; an operator is.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
_SENTENCE = ".,;:!?'\"`\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u00ab\u00bb\u00bf\u00a1\u3001\u3002"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+|[^\\w\\s{_SENTENCE}]")


def is_blank(text: str) -> bool:
    """Whether the text is invisible: white space, zero-width and lone combining characters only."""
    unseen = ("Cc", "Cf", "Zs", "Zl", "Zp", "Mn")
    return all(c in _INVISIBLE or unicodedata.category(c) in unseen for c in text)


def words(text: str) -> list[str]:
    """The text's words and operators, without case, spaces and sentence punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def odd(text: str) -> list[str]:
    """The kinds of ODD characters in the text."""
    return [kind for kind, pattern in ODD.items() if pattern.search(text)]


def reply_texts(row: dict) -> list[str]:
    """The replies of a canonical row: one text, or both sides of a preference."""
    if "messages" in row:
        return [turn_text(row["messages"][-1])]
    if "choices" in row:
        return [row["choices"][row["answer"]]]
    if "question" in row:
        return [row.get("solution", row["answer"])]
    if "chosen" in row:
        return [spoken(row["chosen"]), spoken(row["rejected"])]
    return [spoken(row[key]) for key in ("completion", "answer") if key in row][:1]


def full_text(row: dict) -> str:
    """Prompt and replies."""
    return "\n".join([prompt_text(row), *reply_texts(row)])


def all_text(value) -> str:
    """Every string in a row's content, system turns and wrong choices too."""
    if isinstance(value, str):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return "\n".join(map(all_text, parts))


def digest(value) -> str:
    """A short stable fingerprint of a JSON value."""
    written = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(written.encode()).hexdigest()[:32]


def content(row: dict) -> dict:
    """The row without id, group and source; rows with equal content are exact duplicates."""
    return {key: value for key, value in row.items() if key not in ("id", "group", "source")}


def near_duplicates(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(row, earlier row) pairs that differ only in case, space and sentence punctuation."""
    first: dict[str, tuple[dict, str]] = {}
    pairs = []
    for row in rows:
        exact = digest(content(row))
        replies = [words(text) for text in reply_texts(row)]
        normalised = digest([words(prompt_text(row)), replies, row.get("choices")])
        earlier, earlier_exact = first.setdefault(normalised, (row, exact))
        if earlier_exact != exact:
            pairs.append((row, earlier))
    return pairs


def contradictions(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(row, earlier row) with another verdict on the same: the opposite choice between two answers, the other label of
    a completion, or another answer to a question with the same choices."""
    first: dict[str, tuple[dict, str]] = {}
    pairs = []
    for row in rows:
        if judgement := _judgement(row):
            judged, verdict = judgement
            earlier, earlier_verdict = first.setdefault(judged, (row, verdict))
            if earlier_verdict != verdict:
                pairs.append((row, earlier))
    return pairs


def _judgement(row: dict) -> tuple[str, str] | None:
    """(fingerprint of what a row judges, its verdict); None for a row without a verdict."""
    asked, replies = (
        [row.get("prompt", row.get("question")), row.get("tools")],
        [text.strip() for text in reply_texts(row)],
    )
    if "chosen" in row:
        return digest([asked, sorted(replies)]), replies[0]
    if "label" in row:
        return digest([asked, replies]), str(row["label"])
    if "choices" in row:
        return digest([asked, sorted(row["choices"])]), replies[0]
    return (digest(asked), row["answer"]) if "question" in row else None


def chosen_longer(rows: list[dict]) -> tuple[int, int]:
    """(number of rows whose chosen side is longer than the rejected one, number of preference rows)."""
    sides = [reply_texts(row) for row in rows if "chosen" in row]
    return sum(len(chosen) > len(rejected) for chosen, rejected in sides), len(sides)


class Finding(NamedTuple):
    """A test row that overlaps with a training row: the places of both (file:line), and the kind of overlap."""

    test: str
    train: str
    how: str  # exact, normalised, contained, grams, group

    def __str__(self) -> str:
        meanings = {
            "exact": "the same row or prompt as",
            "normalised": "the same row or prompt, but for case, space and punctuation, as",
            "contained": "its prompt occurs in, or is mostly the prompt of,",
            "grams": f"at least half of its words are in runs of {GRAM} words shared with",
            "group": "the same group as",
        }
        return f"{self.test}: {self.how} overlap: {meanings[self.how]} {self.train}"


def deduplicate(rows: list[dict]) -> tuple[list[dict], list[tuple[dict, dict]]]:
    """(rows without exact repeats of earlier content, the repeats, each with the earlier row)."""
    first: dict[str, dict] = {}
    repeats = [(row, earlier) for row in rows if (earlier := first.setdefault(digest(content(row)), row)) is not row]
    return list(first.values()), repeats


def overlap(train: list[dict], test: list[dict]) -> list[Finding]:
    """One finding for each test row that overlaps with a training row, of the first kind that applies: exact,
    normalised, contained, grams, group. Equal short prompts and boilerplate are no findings.
    """
    train_texts = [words(full_text(row)) for row in train]
    train_prompts = [tuple(words(prompt_text(row))) for row in train]
    test_prompts = [tuple(words(question_asked(prompt_text(row)))) for row in test]
    first: dict[tuple, int] = {}
    prompt_of = [first.setdefault(prompt, j) for j, prompt in enumerate(train_prompts)]  # equal prompts are one
    inside = _find({*train_prompts, *test_prompts}, train_texts, prompt_of)
    boilerplate = {needle for needle, rows in inside.items() if len(needle) < GRAM and len(rows) > COMMON}
    kinds = [
        _same(train, train_prompts, test, test_prompts, boilerplate),
        _contained(inside, first, test_prompts, boilerplate),
        _grams(train_texts, test_prompts, prompt_of),
        _same_group(train, test),
    ]
    findings = []
    for i, row in enumerate(test):
        hit = next((hits[i] for hits in kinds if i in hits), None)
        if hit:
            findings.append(Finding(row["source"], train[hit[0]]["source"], hit[1]))
    return findings


# Each of these returns {index of a test row: (index of a training row, kind of overlap)}.


def _same(train, train_prompts, test, test_prompts, boilerplate: set) -> dict[int, tuple[int, str]]:
    """Test rows whose content or prompt equals a training row's, exactly or normalised."""
    index: dict[str, int] = {}
    for j, (row, prompt) in enumerate(zip(train, train_prompts, strict=True)):
        for key, _ in _keys(row, prompt, boilerplate):
            index.setdefault(key, j)
    hits = {}
    for i, (row, prompt) in enumerate(zip(test, test_prompts, strict=True)):
        equal = [(index[key], how) for key, how in _keys(row, prompt, boilerplate) if key in index]
        if equal:
            hits[i] = equal[0]
    return hits


def _keys(row: dict, prompt: tuple, boilerplate: set) -> list[tuple[str, str]]:
    """(key, kind of overlap) for a row's content and, unless it is short or boilerplate, its prompt."""
    replies = [words(text) for text in reply_texts(row)]
    exact = ("row" + digest(content(row)), "exact")
    normalised = ("words" + digest([prompt or prompt_text(row), replies]), "normalised")
    if len(prompt) < FEWEST_ASKED or prompt in boilerplate:
        return [exact, normalised]
    same_prompt = ("prompt" + digest(prompt_text(row)), "exact")
    return [exact, same_prompt, normalised, ("prompt words" + digest(prompt), "normalised")]


def _contained(inside, first: dict, test_prompts: list[tuple], boilerplate: set) -> dict[int, tuple[int, str]]:
    """Test prompts that occur word for word in a training text, or consist mostly of a training prompt."""
    hits = {}
    for needle, places in _find(set(first), test_prompts, range(len(test_prompts))).items():
        for i in places.values():
            if needle not in boilerplate and len(needle) >= COVERED * len(test_prompts[i]):
                hits[i] = (first[needle], "contained")
    for i, prompt in enumerate(test_prompts):
        if prompt in inside and prompt not in boilerplate:
            hits[i] = (min(inside[prompt].values()), "contained")
    return hits


def _find(needles: set[tuple], haystack: list, prompt_of) -> dict[tuple, dict[int, int]]:
    """{needle: {prompt of a text that contains it: that text}}, in one pass over the texts.

    Needles are indexed by their first words and then by length, so that many prompts from one template cost no more
    than their distinct lengths.
    """
    lengths = defaultdict(set)
    for needle in needles:
        if len(needle) >= FEWEST_CONTAINED:
            lengths[needle[:FEWEST_CONTAINED]].add(len(needle))
    places: dict[tuple, dict[int, int]] = defaultdict(dict)
    for t, text in enumerate(haystack):
        for at, gram in enumerate(_windows(text, FEWEST_CONTAINED)):
            for length in lengths.get(gram, ()):
                needle = tuple(text[at : at + length])
                if len(needle) == length and needle in needles:
                    places[needle].setdefault(prompt_of[t], t)
    return places


def _grams(train_texts, test_prompts: list[tuple], prompt_of) -> dict[int, tuple[int, str]]:
    """Test prompts with half of their words in runs of GRAM words of one training row."""
    where = defaultdict(list)
    for i, prompt in enumerate(test_prompts):
        for at, gram in enumerate(_windows(prompt, GRAM)):
            where[gram].append((i, at))
    rows_with: dict[tuple, dict[int, int]] = defaultdict(dict)
    for j, text in enumerate(train_texts):
        for gram in where.keys() & set(_windows(text, GRAM)):
            rows_with[gram].setdefault(prompt_of[j], j)
    shared: dict[tuple[int, int], set[int]] = defaultdict(set)
    for gram, rows in rows_with.items():
        for j in rows.values() if len(rows) <= COMMON else ():
            for i, at in where[gram]:
                shared[i, j].update(range(at, at + GRAM))
    pairs = sorted(pair for pair, at in shared.items() if len(at) >= COVERED * len(test_prompts[pair[0]]))
    return {i: (j, "grams") for i, j in reversed(pairs)}


def _windows(text, size: int):
    """All runs of `size` words of a text, as tuples."""
    return zip(*(text[start:] for start in range(size)), strict=False)


def _same_group(train: list[dict], test: list[dict]) -> dict[int, tuple[int, str]]:
    """Test rows whose declared group is also a training row's; derived groups are prompts, compared above."""
    first: dict[str, int] = {}
    for j, row in enumerate(train):
        first.setdefault(row["group"], j)
    return {
        i: (first[row["group"]], "group")
        for i, row in enumerate(test)
        if row["group"] in first and not DERIVED.fullmatch(row["group"])
    }
