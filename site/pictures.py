"""Draw the pictures of docs/how-it-works.md: `python site/pictures.py` writes docs/pictures/*.svg.

They are narrow, so that they can be read on a phone, and follow light and dark.
"""

from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).parents[1] / "docs" / "pictures"
WIDTH = 520
STYLE = """
text { font: 15px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1b1f24 }
.soft { fill: #566070 } .small { font-size: 13px } .bold { font-weight: 600 }
.mono { font-family: ui-monospace, monospace }
.paper { fill: #fff } .a { fill: #bfd7ff } .b { fill: #ffe0b3 } .c { fill: #c9ecc9 } .pad { fill: #e9ecf0 }
.box { fill: #f5f7fa; stroke: #8a94a3 } .line { stroke: #566070; fill: none; stroke-width: 1.5 } .tip { fill: #566070 }
@media (prefers-color-scheme: dark) {
  text { fill: #e7eaef } .soft { fill: #a0aaba } .paper { fill: #12151a }
  .a { fill: #27508f } .b { fill: #7d5416 } .c { fill: #2b6b36 } .pad { fill: #262b33 }
  .box { fill: #1b2028; stroke: #66707f } .line { stroke: #a0aaba } .tip { fill: #a0aaba }
}"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words at a place."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box", round_: float = 3) -> str:
    """A rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_:g}" class="{kind}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a tip at its end, level or upright."""
    along = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    back = x2 - 9 * along[0], y2 - 9 * along[1]
    side = 5 * along[1], 5 * along[0]
    tip = f"{x2:g},{y2:g} {back[0] + side[0]:g},{back[1] + side[1]:g} {back[0] - side[0]:g},{back[1] - side[1]:g}"
    line = f'<line x1="{x1:g}" y1="{y1:g}" x2="{back[0]:g}" y2="{back[1]:g}" class="line"/>'
    return line + f'<polygon points="{tip}" class="tip"/>'


def picture(title: str, height: int, parts: list[str]) -> str:
    """A whole file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img"><title>{escape(title)}</title><style>{STYLE}\n</style>'
        f'<rect class="paper" width="100%" height="100%"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


TEXTS = {
    "a": ["A", "dog", "barked"],
    "b": ["Two", "ships", "sailed", "from", "England", "in", "May", "1845"],
    "c": ["Prices", "rose", "again", "last", "year"],
}


def packed() -> str:
    """A padded batch, and the same packed."""
    cell, gap = 56, 2
    parts = [text(16, 30, "A padded batch: 3 x 8 = 24 places", "bold")]
    for row, (kind, words) in enumerate(TEXTS.items()):
        y = 44 + row * 34
        for column in range(8):
            x = 16 + column * (cell + gap) + 12
            word = words[column] if column < len(words) else "pad"
            parts += [box(x, y, cell, 30, kind if column < len(words) else "pad")]
            parts += [text(x + cell / 2, y + 20, word, "small" if column < len(words) else "small soft", "middle")]
    parts += [arrow(260, 152, 260, 184), text(274, 172, "at the door, before the embedding", "soft small")]
    parts += [text(16, 212, "The same packed: 16 tokens, end to end", "bold")]
    wide, x = 28, 28.0
    for kind, words in TEXTS.items():
        for _ in words:
            parts.append(box(x, 226, wide - 1, 34, kind))
            x += wide
    starts, at = [0], 0
    for words in TEXTS.values():
        at += len(words)
        starts.append(at)
    for start in starts:
        place = 28 + start * wide
        parts += [f'<line x1="{place:g}" y1="222" x2="{place:g}" y2="272" class="line"/>']
        parts += [text(place, 288, str(start), "small mono", "middle")]
    for words, middle in (("text 1", 1.5), ("text 2", 7), ("text 3", 13.5)):
        parts.append(text(28 + middle * wide, 248, words, "small", "middle"))
    parts += [text(16, 316, "cu_seqlens = [0, 3, 11, 16]: where each text begins, and the end", "soft small")]
    return picture("A padded batch of three texts, and the same texts packed end to end", 332, parts)


def windows() -> str:
    """What a token sees in a global and in a local layer."""
    parts, size = [], 15
    for left, title, reach in ((16, "Global layer: every third", 99), (276, "Local layers: the other two", 2)):
        parts += [text(left, 30, title, "bold")]
        for row in range(14):
            for column in range(14):
                same = (row < 5) == (column < 5)
                kind = ("a" if row < 5 else "b") if same and abs(row - column) <= reach else "pad"
                parts.append(box(left + column * size, 44 + row * size, size - 1.5, size - 1.5, kind, 1))
    parts += [text(16, 280, "A row for each token, a column for each token that it may see;", "soft small")]
    parts += [text(16, 298, "two packed texts, of 5 and 9 tokens. Grey pairs are never used.", "soft small")]
    parts += [text(16, 316, "The window here reaches 2 tokens to either side; a real one 64.", "soft small")]
    return picture("Which tokens a token sees in a global and in a local layer", 332, parts)


def frozen() -> str:
    """A model, and what runs it once it is frozen."""
    parts = [box(16, 46, 190, 150, round_=8), text(111, 32, "the model", "bold", "middle")]
    for number, words in enumerate(("embeddings", "layer 0", "layer 1", "...", "final_norm")):
        parts += [box(32, 58 + number * 26, 158, 22, "a"), text(111, 74 + number * 26, words, "small mono", "middle")]
    parts += [box(314, 46, 190, 150, round_=8), text(409, 32, "the runner", "bold", "middle")]
    for number, words in enumerate(
        ("weights in the order", "in which kernels", "read them", "5 kernels a layer,", "one call into C")
    ):
        parts += [text(409, 76 + number * 24, words, "small", "middle")]
    parts += [arrow(210, 92, 310, 92), text(260, 82, "freeze", "small", "middle")]
    parts += [arrow(310, 152, 210, 152), text(260, 174, "thaw", "small", "middle")]
    parts += [text(16, 226, "optimize_for_inference() moves each weight; it is held once.", "soft small")]
    parts += [text(16, 244, "Training, saving, moving or a hook thaws it, to the same bits.", "soft small")]
    return picture("A model whose weights move into a runner, and back", 260, parts)


def bits() -> str:
    """Why the same numbers can have two sums."""
    parts = [text(16, 30, "The order of a sum changes its last bits", "bold")]
    terms = ("a", "b", "c", "d")
    for left, title, tree in ((16, "alone", False), (276, "in a batch of 32", True)):
        parts += [text(left, 58, f"another library, {title}", "soft small")]
        for number, term in enumerate(terms):
            x = left + number * 56
            parts += [box(x, 70, 44, 28, "b"), text(x + 22, 89, term, "mono", "middle")]
        sum_ = "(a + b) + (c + d)" if tree else "((a + b) + c) + d"
        parts += [text(left, 124, sum_, "mono")]
    parts += [text(16, 164, "Here: one order, whatever is computed beside it", "bold")]
    for left, title in ((16, "alone"), (188, "in any batch"), (360, "padded or packed")):
        parts += [text(left, 192, title, "soft small"), box(left, 202, 144, 34, "c")]
        parts += [text(left + 72, 224, "((a + b) + c) + d", "small mono", "middle")]
    return picture("Sums in an order that depends on the batch, and sums in one order", 254, parts)


PICTURES = {"packed": packed, "windows": windows, "frozen": frozen, "bits": bits}

if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (OUT / f"{name}.svg").write_text(draw(), encoding="utf-8")
