"""Draw README's picture of the stages from the table of stages.

python docs/draw.py    # writes docs/stages.svg
"""

from pathlib import Path
from statistics import fmean

from posttrain.config.stages import ALIGNED, JUDGES, POLICIES, STAGES

WIDTH, HEIGHT, STEP = 380, 32, 60  # of the picture, of a box, from row to row, in pixels
FILL = {"policy": "#0b5fa5", "judgement": "#f6e4bf", "reward": "#d9eed9"}
NOTES = {"base": "untouched model", "sft": "fine-tuning", "longctx": "longer context", "report": "tables, page"}
LEGEND = ("Blue: a policy. Any of them can go on to longctx,", "and every one is judged.")
LINE = '<path d="M{:g} {:g} L{:g} {:g}" stroke="#555" stroke-width="1.5" marker-end="url(#head)"/>'
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="img">
<title>The stages: {2}</title>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>
<rect width="{0}" height="{1}" rx="8" fill="#fff"/>"""
TUNED = [name for name in ALIGNED if name in POLICIES]
APART = [name for name, stage in STAGES.items() if stage.makes == "identities"]  # they read no artifact
HELPERS = {name: [role for role in STAGES[name].reads if role in STAGES and role not in POLICIES] for name in TUNED}


def places() -> dict[str, tuple[float, int]]:
    """Middle and row of each stage's box. What only aligned policies read stands above them."""
    with_helper = [name for name in TUNED if HELPERS[name]]
    half = len(with_helper) // 2
    aligned = [*with_helper[:half], *(name for name in TUNED if not HELPERS[name]), *with_helper[half:]]
    spots = {"fetch": (WIDTH / 6, 0)} | spread(aligned, 4) | spread(JUDGES, 6)
    spots |= {
        name: (WIDTH / 2, row) for name, row in (("prepare", 0), ("base", 1), ("sft", 2), ("longctx", 5), ("report", 7))
    }
    spots |= {name: (WIDTH / 6, 7) for name in APART}
    readers = {role: [name for name in aligned if role in HELPERS[name]] for name in aligned for role in HELPERS[name]}
    return spots | {role: (fmean(spots[name][0] for name in names), 3) for role, names in readers.items()}


def spread(names, row: int) -> dict[str, tuple[float, int]]:
    """Boxes side by side in a row."""
    return {name: (WIDTH * (index + 0.5) / len(names), row) for index, name in enumerate(names)}


def edges() -> list[tuple[str, str]]:
    """Which stage reads which, without what it reads through another one."""
    pairs = [("prepare", "base"), ("base", "sft")]
    for name in TUNED:
        for role in HELPERS[name]:
            pairs += [("sft", role), (role, name)]
        pairs += [] if HELPERS[name] else [("sft", name)]
        pairs += [(name, "longctx")]
    pairs += [pair for judge in JUDGES for pair in (("longctx", judge), (judge, "report"))]
    return list(dict.fromkeys(pairs))


def words(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    """Text at a place."""
    font = 'font-family="ui-sans-serif, system-ui, sans-serif" font-size="13"'
    return f'<text x="{x:g}" y="{y:g}" {font} fill="#1a1a1a" text-anchor="{anchor}" {more}>{text}</text>'


def box(name: str, x: float, top: int, wide: float) -> list[str]:
    """A stage's box with its name."""
    makes = STAGES[name].makes if name in STAGES else ""
    place = f'x="{x - wide / 2:g}" y="{top}" width="{wide:g}" height="{HEIGHT}" rx="6"'
    ink = "#fff" if makes == "policy" else "#1a1a1a"
    return [
        f'<rect {place} stroke="#555" fill="{FILL.get(makes, "#eee")}"/>',
        words(x, top + 21, name, more=f'font-weight="600" style="fill: {ink}"'),
    ]


def picture() -> str:
    """The text of the SVG."""
    spots = places()
    top = {name: 10 + STEP * row for name, (_, row) in spots.items()}
    wide = min(108, WIDTH / len(TUNED) - 12)
    tall = 10 + 8 * STEP + 30
    parts = [HEAD.format(WIDTH, tall, ", ".join(spots))]
    parts += [LINE.format(spots[a][0], top[a] + HEIGHT, spots[b][0], top[b] - 2) for a, b in edges()]
    for left, right in (("fetch", "prepare"), *((name, "report") for name in APART)):
        level = top[left] + HEIGHT / 2
        parts += [LINE.format(spots[left][0] + wide / 2, level, spots[right][0] - wide / 2 - 2, level)]
    for name, (x, _) in spots.items():
        parts += box(name, x, top[name], wide)
    parts += [words(spots[name][0] + wide / 2 + 10, top[name] + 21, note, "start") for name, note in NOTES.items()]
    parts += [words(WIDTH / 2, tall - 26 + 18 * index, text) for index, text in enumerate(LEGEND)]
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    Path(__file__).with_name("stages.svg").write_text(picture())
