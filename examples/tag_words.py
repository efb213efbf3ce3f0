"""Train a tagger, here of amounts, units and foods in recipes.

The rows are made here: words, and a tag for each. B- begins an entity, I- goes on with it, O is none. The rows to
evaluate on have foods that no row to train on has, so the tagger must know a food by what stands around it.

    pip install '.[train]'
    python examples/tag_words.py
    python examples/tag_words.py --epochs 1    # faster, and worse

It takes less than a minute on two processor cores, and prints:

    120 rows; 30 more, of other foods, to evaluate on
    entities found with the right bounds and tag (F1): ...
    Melt 80 grams of butter and add 3 spoons of brown sugar .
       amount 80 | unit grams | food butter | amount 3 | unit spoons | food brown sugar
    Heat 2 litres of apple juice for ten minutes .
       amount 2 | unit litres | food apple...

The F1 was 0.83 on the machine where this was written, and "juice" was missed. Rows of your own can be a .conll file, a
.jsonl file or a table; `model="answerdotai/ModernBERT-base"` starts from a model that has read more than the small
encoder of the package.
"""

import argparse
import random
import tempfile
from pathlib import Path

from modernbert import finetune

FOODS = ["flour", "white sugar", "olive oil", "red onions", "salt", "milk", "brown rice", "tomatoes", "black pepper"]
OTHERS = ["honey", "white beans", "carrots", "green apples", "water", "orange juice"]
UNITS = ["grams", "cups", "spoons", "litres", "slices", "pounds"]
NEW = ["Melt 80 grams of butter and add 3 spoons of brown sugar .", "Heat 2 litres of apple juice for ten minutes ."]


def recipe(rng: random.Random, foods: list[str]) -> dict[str, list[str]]:
    parts = [(rng.choice(["Add", "Mix", "Heat", "Weigh", "Take"]), None)]
    for number in range(rng.choice([1, 2])):
        parts += [("and", None)] * number
        parts += [(str(rng.choice([2, 3, 4, 50, 100, 250])), "amount"), (rng.choice(UNITS), "unit")]
        parts += [("of", None)] * rng.choice([0, 1, 1]) + [(rng.choice(foods), "food")]
    parts.append((rng.choice(["and stir .", "in a large bowl .", "for ten minutes .", "and wait ."]), None))
    row: dict[str, list[str]] = {"tokens": [], "tags": []}
    for text, tag in parts:
        for place, word in enumerate(text.split()):
            row["tokens"].append(word)
            row["tags"].append("O" if tag is None else f"{'I' if place else 'B'}-{tag}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    rng = random.Random(0)
    rows, held_out = [recipe(rng, FOODS) for _ in range(120)], [recipe(rng, OTHERS) for _ in range(30)]
    print(f"{len(rows)} rows; {len(held_out)} more, of other foods, to evaluate on")

    with tempfile.TemporaryDirectory() as place:  # a real model stays on the disk
        output, epochs = Path(place) / "tagger", parser.parse_args().epochs
        run = finetune("token-classification", rows, held_out, output=output, epochs=epochs, batch_size=8)
        print(f"entities found with the right bounds and tag (F1): {run.metrics['f1']:.2f}")

        tag = run.pipeline(aggregation_strategy="first", is_split_into_words=True)
        for text, found in zip(NEW, tag([text.split() for text in NEW]), strict=True):
            print(text, "\n  ", " | ".join(f"{one['entity_group']} {one['word'].strip()}" for one in found))


if __name__ == "__main__":
    main()
