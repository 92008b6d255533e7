"""Weights of sources: whose rows are read how often, and what prepare and check tell.

pytest tests/unit/test_mixture.py
"""

from collections import Counter

import pytest
from test_campaign import GOOD, problems
from tiny import sft

from posttrain.config.sections import Prepare, Source
from posttrain.data import mixture
from posttrain.training.order import Part, in_batches, turns

PARTS = [Part("a", 4, 0.75), Part("b", 10, 0.25)]


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
    ("prepare", "more", "words"),
    [
        ("sft: [{path: A, weight: 2}]", "", "prepare.sft[0].weight: has no effect on the only source"),
        ("sft: [{path: A, weight: 2}, {path: A}]", "", "A is read by two sources, and rows are weighed by where"),
        ("sft: [{path: A, weight: 2, use: test}, {path: B}]", "", "prepare.sft[0].weight: has no effect here"),
        ("sft: [{path: A, weight: 2}, {path: B}]", "packing", "sft.packing: a packed sequence holds rows of several"),
        ("sft: [{path: A}, {path: B}], weigh_by: tokens", "", "prepare.weigh_by: has no effect without a source"),
        ("sft: [{path: A, weight: 0.0}, {path: B}]", "", "prepare.sft[0].weight: found 0.0"),
    ],
)
def test_what_check_tells(tmp_path, prepare, more, words):
    for name in ("A", "B"):
        (tmp_path / name).write_text("")
    text = f"{{text: [{{path: A}}], {prepare}}}".replace(": A", f": {tmp_path}/A").replace(": B", f": {tmp_path}/B")
    text = GOOD.replace("{world: {}}", text).replace("qlora", "qlora, packing: true" if more else "qlora")
    assert words.replace("A is", f"{tmp_path}/A is") in problems(tmp_path, one=text)
