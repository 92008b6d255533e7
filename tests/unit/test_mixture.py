"""Weights of sources: whose rows are read how often, and what prepare and check tell.

pytest tests/unit/test_mixture.py
"""

from collections import Counter

import pytest
from test_campaign import GOOD, load, problems
from tiny import sft

from posttrain.config.sections import Longctx, Prepare, Source
from posttrain.data import mixture, packing
from posttrain.ground.errors import UserError
from posttrain.ground.files import write_json, write_jsonl
from posttrain.stages import longctx
from posttrain.stages.base import mixed_blocks
from posttrain.training.order import Part, in_batches, in_sequences, parts_of, turns

PARTS = [Part("a", 4, 0.75, 0.75), Part("b", 10, 0.25, 0.25)]


def order(parts=PARTS, rows=14, **changes) -> list[int]:
    return list(in_batches(range(rows), sft(**{"steps": 10, "batch_size": 8} | changes), parts))


def test_each_source_is_read_by_its_share_and_each_of_its_rows_equally_often(capsys):
    read = Counter(order())
    assert sum(read[row] for row in range(4)) == 60 and sum(read[row] for row in range(4, 14)) == 20
    assert [read[row] for row in range(4)] == [15] * 4 and [read[row] for row in range(4, 14)] == [2] * 10
    log = capsys.readouterr().err
    assert "60 of 80 rows that are read are of a: each of its 4 15.00 times" in log
    assert Counter(order(parts=())) != read, "control: without weights, all rows are read equally often"


def test_every_beginning_of_a_run_has_the_shares():
    for shares in ([0.75, 0.25], [0.5, 0.3, 0.2], [0.999, 0.001], [1 / 3] * 3):
        whose = turns(1000, shares).tolist()
        assert whose[:400] == turns(400, shares).tolist(), "a longer run begins as a shorter"
        for end in range(1, 1001, 37):
            counts = Counter(whose[:end])
            assert all(abs(counts[n] - end * share) <= 1.5 for n, share in enumerate(shares)), (shares, end)


def test_a_longer_run_begins_as_a_shorter_and_follows_the_seed():
    assert order(steps=3) == order()[:24] and order(seed=1) != order()
    assert order(order="file")[:8] == [0, 1, 4, 2, 3, 0, 5, 1]
    first = [row for row in order() if row < 4]
    assert sorted(first[:4]) == sorted(first[4:8]) == [0, 1, 2, 3], "passes through the rows of a source"


def test_rows_that_were_divided_stay_in_their_part():
    """`kto` on pairs: two rows for each."""
    read = Counter(order(rows=28))
    assert sum(read[row] for row in range(8)) == 60 and sum(read[row] for row in range(8, 28)) == 20


def test_packed_rows_are_read_as_often_as_unpacked_ones():
    """4 rows in 1 sequence and 10 rows in 5: a row is read as often as its sequence."""
    counted = in_sequences(PARTS, [1, 5])
    assert [part.rows for part in counted] == [1, 5] and sum(part.share for part in counted) == pytest.approx(1)
    per_row = [part.share / part.rows for part in counted]
    assert per_row[0] / per_row[1] == pytest.approx((0.75 / 4) / (0.25 / 10)), "the ratio without packing"
    assert in_sequences([], [7]) == []


def read_counts(sequences, parts, steps=400) -> Counter:
    """How often each first token of a row is read: token 100 * part + row."""
    read: Counter[int] = Counter()
    for sequence in in_batches(sequences, sft(steps=steps, batch_size=8), parts):
        read.update(token for token in sequence["input_ids"] if token >= 100)
    return read


class Words:
    """A tokenizer whose words are numbers."""

    bos_token_id, eos_token_id, all_special_ids = 0, 9, ()

    def __call__(self, texts, **_):
        return type("Encoded", (), {"input_ids": [[int(word) for word in text.split()] for text in texts]})


def test_documents_of_each_source_fill_blocks_of_their_own():
    """Documents of a are twice as long as those of b; a block's share reads each document by the weights."""
    documents = [[100 + n] + [1] * 13 for n in range(4)] + [[200 + n] + [1] * 5 for n in range(10)]
    blocks, parts = mixed_blocks(Words(), documents, 8, PARTS)
    assert [part.rows for part in parts] == [60 // 7, 70 // 7] and len(blocks) == 18
    owners = [{token // 100 for token in block["input_ids"] if token >= 100} for block in blocks]
    assert all(owner <= {1} for owner in owners[:8]) and all(owner <= {2} for owner in owners[8:])
    read = read_counts(blocks, parts)
    of_parts = [sum(count for token, count in read.items() if token // 100 == part) for part in (1, 2)]
    assert of_parts[0] / sum(of_parts) == pytest.approx(0.75, abs=0.01)
    whole, none = mixed_blocks(Words(), documents, 8, [])
    assert whole == packing.blocks(Words(), documents, 8) != blocks and none == [], "control: without weights"
    with pytest.raises(UserError, match="the text of a has 60 tokens, fewer than one context of 100"):
        mixed_blocks(Words(), documents, 100, PARTS)


def test_long_documents_are_read_by_their_weights(tmp_path, monkeypatch):
    """The beginnings of those that are long enough; with packing, blocks. All rows are equally long: also by tokens."""
    monkeypatch.setattr("posttrain.models.control.plain", lambda _, texts: Words()(texts).input_ids)
    folder = tmp_path / "data/long"
    folder.mkdir(parents=True)
    texts = [f"{100 + n} " + "1 " * (20 if n else 2) for n in range(4)] + [f"{200 + n} " + "1 " * 9 for n in range(10)]
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in texts])
    entries = [{"source": "a", "rows": 4, "share": 0.6, "weight": 0.75},
               {"source": "b", "rows": 10, "share": 0.4, "weight": 0.25}]  # fmt: skip
    write_json(folder / "mixture.json", entries)
    parts = parts_of(tmp_path / "manifest.json", "long")
    rows, counted = longctx.documents(Longctx(), Words(), tmp_path / "manifest.json", "train", 8, parts)
    assert counted == [Part("a", 3, 0.75, 0.75), Part("b", 10, 0.25, 0.25)] and len(rows) == 13
    packed, blocks = longctx.documents(Longctx(packing=True), Words(), tmp_path / "manifest.json", "train", 8, parts)
    counts = [(4 + 3 * 22) // 7, 10 * 11 // 7]
    assert blocks == in_sequences(parts, counts) and len(packed) == sum(counts)
    assert longctx.documents(Longctx(), Words(), tmp_path / "manifest.json", "train", 8)[1] == [], "control"
    with pytest.raises(UserError, match=r"none of 10 documents in .*train\.jsonl \(b\) has 16 tokens"):
        longctx.documents(Longctx(), Words(), tmp_path / "manifest.json", "train", 16, parts)


def shares(weigh_by=None, **weights) -> dict[str, tuple[float, float]]:
    sources = [Source(path=f"{name}.jsonl", weight=weight) for name, weight in weights.items()]
    places = [f"{name}.jsonl:{n}" for name in weights for n in range(2 if name == "a" else 6)]
    lengths = [30 if place.startswith("a") else 10 for place in places]
    section = Prepare(sft=sources, weigh_by=weigh_by)
    entries = mixture.shares(section, "sft", [], places, lengths)
    return {entry["source"]: (entry["share"], entry["times"]) for entry in entries}


def test_shares_of_rows_and_of_tokens():
    assert shares(a=1.0, b=1.0) == {"a.jsonl": (0.5, 2.0), "b.jsonl": (0.5, pytest.approx(2 / 3))}
    assert shares(a=3.0, b=None) == {"a.jsonl": (0.75, 3.0), "b.jsonl": (0.25, pytest.approx(1 / 3))}
    by_tokens = shares(weigh_by="tokens", a=1.0, b=1.0)
    read = {name: share * (30 if name == "a.jsonl" else 10) for name, (share, _) in by_tokens.items()}
    assert read["a.jsonl"] == pytest.approx(read["b.jsonl"]) and by_tokens["a.jsonl"][0] == pytest.approx(0.25)


def test_rows_of_the_world_and_of_shards(tmp_path):
    for name in ("x-1.jsonl", "x-2.jsonl"):
        (tmp_path / name).write_text("")
    section = Prepare(sft=[Source(path=f"{tmp_path}/x-*.jsonl", weight=3.0)])
    places = ["world:sft-train-0", *(f"{tmp_path}/x-{n}.jsonl:1" for n in (1, 2))]
    entries = mixture.shares(section, "sft", [], places, [5, 5, 5])
    assert [(entry["source"], entry["rows"], entry["share"]) for entry in entries] == [
        (mixture.WORLD, 1, 0.25),
        (f"{tmp_path}/x-*.jsonl", 2, 0.75),
    ]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ("sft: [{path: A, weight: 2}]", "prepare.sft[0].weight: has no effect on the only source"),
        ("sft: [{path: A, weight: 2}, {path: A}]", "A is read by two sources, and rows are weighed by where"),
        ("sft: [{path: A, weight: 2, use: test}, {path: B}]", "prepare.sft[0].weight: has no effect here"),
        ("long: [{path: A, weight: 2}, {path: B}]", "prepare.long[0].weight: has no effect without a longctx"),
        ("choices: [{path: A, weight: 2}, {path: B}]", "prepare.choices[0].weight: has no effect here"),
        ("sft: [{path: A}, {path: B}], weigh_by: tokens", "prepare.weigh_by: has no effect without a source"),
        ("sft: [{path: A}, {path: B}], overlap: drop", "prepare.overlap: has no effect without a source of use: test"),
        ("sft: [{path: A, weight: 0.0}, {path: B}]", "prepare.sft[0].weight: found 0.0"),
    ],
)
def test_what_check_tells(tmp_path, prepare, words):
    for name in ("A", "B"):
        (tmp_path / name).write_text("")
    text = f"{{text: [{{path: A}}], {prepare}}}".replace(": A", f": {tmp_path}/A").replace(": B", f": {tmp_path}/B")
    text = GOOD.replace("{world: {}}", text)
    assert words.replace("A is", f"{tmp_path}/A is") in problems(tmp_path, one=text)


def test_check_takes_weights_of_documents_and_with_packing(tmp_path):
    """Control: without a stage that trains on the documents, they are refused; an inherited one is not."""
    for name in ("A.jsonl", "B.jsonl"):
        (tmp_path / name).write_text("")
    pair = f"[{{path: {tmp_path}/A.jsonl, weight: 2}}, {{path: {tmp_path}/B.jsonl}}]"
    one = f"prepare: {{text: {pair}, sft: {pair}, long: {pair}}}\n"
    one += "base: {scratch: {}}\nsft: {packing: true}\nlongctx: {}\n"
    plan = load(tmp_path, "experiments: [one, two]\n", one=one, two="extends: one\nlongctx: null\n")
    assert plan.experiments["two"].prepare.long[0].weight == 2
    told = problems(tmp_path, one=one.replace("{scratch: {}}", f"{{path: {tmp_path}}}"))
    assert "prepare.text[0].weight: has no effect without base.scratch" in told and "sft[0]" not in told
