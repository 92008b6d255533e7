"""Run tiny random models of many architectures through every stage, and write which stages work into
docs/architectures.md.

python docs/architectures.py
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

HEAD = """# Architectures

Each model is tiny and random. Each column is an experiment of two steps, with evaluation, perplexity by length,
comparison and export of its policies. *no* with a number has its reason below: *refused* by `posttrain check`, before
any job starts, or *fails*, which is a fault of ours. `python docs/architectures.py` writes this page, and
`pytest tests/stages/test_zoo.py` holds it to be true.

"""


def main() -> None:
    """Write the page."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    from zoo import ZOO, outcomes, table

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        os.chdir(folder)
        for name in ZOO:
            rows[name], _ = outcomes(name, Path(folder) / name)
            shown = {column: outcome for column, outcome in rows[name].items() if outcome != "works"}
            print(f"{name}: {shown or 'works'}", file=sys.stderr)
        os.chdir(ROOT)
    (ROOT / "docs/architectures.md").write_text(HEAD + table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
