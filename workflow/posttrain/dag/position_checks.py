"""What a given model's `config.json` says before any job: whether its context can be extended, and where it ends."""

from collections.abc import Iterator

from posttrain.config.stages import Experiment
from posttrain.dag.given import given
from posttrain.ground.errors import UserError
from posttrain.maths import rope


def position_mistakes(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Settings that the positions of a given model do not allow."""
    values, longctx, sft = given(experiment.base).config, experiment.longctx, experiment.sft
    if not values:
        return
    if longctx:
        try:
            rope.extended(values, longctx.method, longctx.factor)
        except UserError as refusal:
            yield "longctx.method", str(refusal)
    virtual = sft.virtual_tokens if sft and sft.method in ("prefix", "prompt") else 0
    if sft and sft.method == "prefix" and rope.kind(values) in rope.BY_LENGTH:
        yield "sft.method", f"prefix has keys of one length, and positions of {rope.kind(values)} depend on the length"
    family, last = values.get("model_type"), rope.end(values)
    wanted = {"sft.virtual_tokens": experiment.longest_row} if virtual else {}
    if experiment.lengths and (virtual or family != "mpt"):  # `positions.make_room` makes MPT's ALiBi longer
        wanted["lengths.tokens"] = max(experiment.lengths.tokens)
    for key, tokens in wanted.items():
        if last and tokens + virtual > last:
            also = f" after {virtual} virtual tokens" if virtual else ""
            yield key, f"{tokens} tokens{also} do not fit: {family} has {last} positions and none beyond them"
