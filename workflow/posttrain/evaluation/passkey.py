"""Passkey retrieval on any model: a number in a text without meaning is asked for at the end.

The prompt is that of Landmark attention (Mohtashami and Jaggi 2023, arXiv 2305.16300), which position interpolation
(Chen et al. 2023, arXiv 2306.15595, section 3.3) and YaRN (arXiv 2309.00071) use: plain text, without a chat template.
Lengths are in tokens of the judged model. All policies with one tokenizer get the same questions.
"""

import random
import re

from posttrain.config.sections import Passkey
from posttrain.ground.errors import UserError
from posttrain.maths.intervals import mean_stderr
from posttrain.models import control

TASK = "landmark_passkey"
BEGINNING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
STATEMENT = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
FOUND = 0.2  # share of keys from which on a distance counts as reached (2306.15595, section 3.3)


def questions(section: Passkey, tokenizer, length: int) -> list[dict]:
    """Questions of at most `length` tokens with their answers: `ids`, `key`, `depth` in percent, and `distance`, tokens
    from the key to the text's end. Raises UserError where the text without any filler is longer."""
    rng, rows = random.Random(f"{TASK}:{length}"), []
    for number in range(section.questions):
        depth, key = number % section.depths / (section.depths - 1), str(rng.randint(10000, 99999))
        room = length - _longest(tokenizer, key)
        fillers = room // len(control.plain(tokenizer, f" {FILLER}"))
        while fillers >= 0 and len(_ids(tokenizer, _text(key, depth, fillers))) > room:
            fillers -= 1
        if fillers < 0:
            least = len(_ids(tokenizer, _text(key, depth, 0))) + length - room
            raise UserError(f"lengths.tokens: {length} is too short for lengths.passkey, which needs {least} tokens")
        text = _text(key, depth, fillers)
        ids, before = _ids(tokenizer, text), _ids(tokenizer, text[: text.rindex(" is the pass key.")])
        row = {"id": f"{length}-{number}", "length": length, "depth": round(100 * depth), "key": key}
        rows.append(row | {"distance": len(ids) - len(before), "ids": ids})
    return rows


def _text(key: str, depth: float, fillers: int) -> str:
    """A question with so many fillers, of which the share `depth` comes before the key."""
    before = round(depth * fillers)
    parts = [BEGINNING, " ".join([FILLER] * before), STATEMENT.format(key=key), " ".join([FILLER] * (fillers - before))]
    return "\n".join([*parts, QUESTION])


def _ids(tokenizer, text: str) -> list[int]:
    """The tokens of a question, begun as every text of `lengths` is."""
    return [control.opening(tokenizer), *control.plain(tokenizer, text)]


def _longest(tokenizer, key: str) -> int:
    """Tokens of a reply: of the key, and of what must follow to see that the number ends."""
    return len(control.plain(tokenizer, f" {key}.")) + 1


def reply(model, tokenizer, question: dict) -> str:
    """A model's greedy reply. One question at a time, so that no padding is read and one cache is held."""
    import torch
    from transformers import GenerationConfig

    ids = torch.tensor([question["ids"]], device=model.device)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, GenerationConfig()  # its penalties would forbid to repeat
    settings = GenerationConfig(
        max_new_tokens=_longest(tokenizer, question["key"]), do_sample=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    inner.generation_config = own
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def score(question: dict, text: str) -> dict:
    """What is recorded of a question: whether the first number of the reply is the key, as in Landmark attention."""
    numbers = re.findall(r"\d+", text)
    kept = {name: value for name, value in question.items() if name != "ids"} | {"tokens": len(question["ids"])}
    return kept | {"reply": text, "exact_match": float(numbers[:1] == [question["key"]])}


def table(scored: list[dict]) -> list[dict]:
    """The table's rows of one length: the share of keys that are found, of all and by depth, and k_max."""
    name = f"{TASK}_{scored[0]['length']}"
    of_depth: dict[int, list[dict]] = {}
    for row in scored:
        of_depth.setdefault(row["depth"], []).append(row)
    rows = [_share(name, scored), {"task": name, "metric": "k_max", "value": float(k_max(list(of_depth.values())))}]
    rows[1] |= {"stderr": None, "n": len(scored), "higher_is_better": True}
    return rows + [_share(f"{name}_depth_{depth}", of_depth[depth]) | {"member": True} for depth in sorted(of_depth)]


def _share(task: str, scored: list[dict]) -> dict:
    value, stderr = mean_stderr(row["exact_match"] for row in scored)
    row = {"task": task, "metric": "exact_match", "value": value, "stderr": stderr}
    return row | {"n": len(scored), "higher_is_better": True}


def k_max(depths: list[list[dict]]) -> int:
    """The largest distance in tokens up to which, at each depth, the share of FOUND is reached; 0 where at none
    (2306.15595, section 3.3)."""
    reached = 0
    shares = [(min(r["distance"] for r in rows), mean_stderr(r["exact_match"] for r in rows)[0]) for rows in depths]
    for distance, share in sorted(shares):  # of two depths with the same distance, the worse one first
        if share < FOUND:
            break
        reached = distance
    return reached
