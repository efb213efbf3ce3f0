"""Training data and evaluation of the small models that search.

    python benchmarks/retrieval.py prepare ../shared/data retrieval-data
    python benchmarks/retrieval.py table retrieval-data --late FOLDER --sparse FOLDER --reranker FOLDER

`prepare` writes pairs of texts that belong together, for `modernbert finetune`, and three sets of questions that no
training text comes from:

- squad: the questions of five articles over the paragraphs of all articles; one paragraph is right;
- sections: the title of an article and of one of its sections, over sections of articles; the section is right. The
  title's words are left out of its first sentence;
- intents: what somebody asks a bank or an assistant, over what others asked; all requests with the same intent are
  right. No request with one of these intents is trained on.

`table` compares words (BM25), vectors of each kind, their fusion and a reranker by recall and nDCG at 10.
"""

import argparse
import csv
import json
import math
import random
import re
import tempfile
from collections import defaultdict
from pathlib import Path

# Most pairs of a source, so that training takes under an hour on two cores.
MOST = {"sentences": 20_000, "headings": 17_000, "neighbours": 7_000, "commonsense": 6_000}

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“\u2018(])")
HEADING = re.compile(r"^[^.]{2,60}\.$")


def read_json_lines(path):
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_json_lines(path, rows):
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows):,}")


# Sources


def squad(path):
    """Each of (article, paragraph, questions)."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    for article in articles:
        for paragraph in article["paragraphs"]:
            yield article["title"], paragraph["context"], [entry["question"] for entry in paragraph["qas"]]


def wikipedia(folder):
    """Each of (title, [(heading, paragraphs)]); the lead has no heading."""
    seen = set()
    for name in ("articles.jsonl", "long_articles.jsonl"):
        for row in read_json_lines(folder / name):
            if row["title"] in seen:
                continue
            seen.add(row["title"])
            sections = [("", [])]
            for line in row["text"].split("\n"):
                line = line.strip()
                if HEADING.match(line) and len(line.split()) <= 8:
                    sections.append((line[:-1], []))
                elif len(line) >= 100:
                    sections[-1][1].append(line)
            yield row["title"], [section for section in sections if section[1]]


def requests(folder):
    """Each of (intent, requests): of a bank's customers and of an assistant's users."""
    found = defaultdict(list)
    with (folder / "banking77-train.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found["bank: " + row["category"]].append(" ".join(row["text"].split()))
    assistant = json.loads((folder / "clinc150-train-val.json").read_text(encoding="utf-8"))
    for text, intent in assistant["train"] + assistant["val"]:
        if intent != "oos":
            found["assistant: " + intent].append(text)
    return sorted((intent, sorted(set(texts))) for intent, texts in found.items())


def shortened(paragraph, characters, draw):
    """Whole sentences of a paragraph, from a random one on, of about this many characters."""
    sentences = SENTENCE_END.split(paragraph)
    start = draw.randrange(len(sentences))
    while start > 0 and sum(map(len, sentences[start:])) < characters:
        start -= 1
    kept = []
    for sentence in sentences[start:]:
        if kept and sum(map(len, kept)) + len(sentence) > characters:
            break
        kept.append(sentence)
    return " ".join(kept)[: 2 * characters]


# Training pairs


def questions_of_sentences(paragraph, draw):
    """A sentence, and the text around it; now and then with itself, so that equal words count as well."""
    sentences = SENTENCE_END.split(paragraph)
    if len(sentences) < 2:
        return None
    i = draw.randrange(len(sentences))
    around = (
        sentences[max(0, i - 3) : i] + (sentences[i : i + 1] if draw.random() < 0.4 else []) + sentences[i + 1 : i + 4]
    )
    query = sentences[i]
    if draw.random() < 0.5:  # as somebody would type it: some of its words
        words = query.rstrip(".").split()
        if len(words) > 5:
            kept = sorted(draw.sample(range(len(words)), draw.randint(3, min(10, len(words) - 1))))
            query = " ".join(words[k] for k in kept)
    return query, " ".join(around)


def training_pairs(data, held_articles, held_intents, draw):
    """Lists of pairs by where they come from."""
    pairs = defaultdict(list)
    for _, paragraph, questions in squad(data / "question_answering/squad-v1-train.json"):
        pairs["squad"] += [(" ".join(q.split()), paragraph) for q in dict.fromkeys(questions)]
    for title, sections in wikipedia(data / "text/wikipedia"):
        if title in held_articles:
            continue
        paragraphs = [(heading, text) for heading, texts in sections for text in texts]
        for (heading, text), (_, after) in zip(paragraphs, [*paragraphs, ("", "")][1:], strict=True):
            if found := questions_of_sentences(text, draw):
                pairs["sentences"].append(found)
            pairs["headings"].append((f"{title} {heading}".strip(), shortened(text, 500, draw)))
            if after and draw.random() < 0.3:
                pairs["neighbours"].append((shortened(text, 250, draw), shortened(after, 400, draw)))
    for row in read_json_lines(data / "multiple_choice/commonsense_qa-train.jsonl"):
        pairs["commonsense"].append((row["question"], row["choices"][row["label"]]))
    with (data / "multiple_choice/codah-train.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            pairs["codah"].append((row[1], row[2 + int(row[6])]))
    for intent, texts in requests(data / "classification"):
        if intent in held_intents:
            continue
        others = draw.sample(texts, len(texts))
        pairs["intents"] += [(a, b) for a, b in zip(texts, others, strict=True) if a != b]
    return pairs


def ranked_intents(data, held_intents, draw):
    """Rows of text-ranking: a request, another one with its intent, and four of the same source with others."""
    known = [(intent, texts) for intent, texts in requests(data / "classification") if intent not in held_intents]
    rows = []
    for intent, texts in known:
        source = intent.split(":")[0]
        others = [text for other, found in known if other != intent and other.startswith(source) for text in found]
        for query, document in zip(texts, draw.sample(texts, len(texts)), strict=True):
            if query != document:
                rows.append({"query": query, "document": document, "negatives": draw.sample(others, 4)})
    return rows


# Questions that are held out


def squad_set(data):
    corpus, queries = {}, []
    for name in ("train", "dev"):
        for _, paragraph, questions in squad(data / f"question_answering/squad-v1-{name}.json"):
            number = corpus.setdefault(paragraph, len(corpus))
            if name == "dev":
                queries += [(" ".join(q.split()), [number]) for q in dict.fromkeys(questions)]
    return list(corpus), queries


def sections_set(data, held_articles, draw):
    """Sections of the held-out articles are asked for, among as many of others."""
    corpus, queries, others = [], [], []
    for title, sections in wikipedia(data / "text/wikipedia"):
        for heading, texts in sections:
            if title not in held_articles:
                others.append(texts[0][:900])
            elif heading:
                first, *rest = SENTENCE_END.split(texts[0])
                words = set(re.findall(r"\w+", title.lower()))
                kept = [word for word in first.split() if not words & set(re.findall(r"\w+", word.lower()))]
                queries.append((f"{title} {heading}", [len(corpus)]))
                corpus.append(" ".join([*kept, *rest])[:900])
    return corpus + draw.sample(others, min(len(others), 4000)), queries


def intents_set(data, held_intents, draw):
    corpus, queries, numbers = [], [], defaultdict(list)
    for intent, texts in requests(data / "classification"):
        if intent in held_intents:
            mixed = draw.sample(texts, len(texts))
            asked, found = mixed[:10], mixed[10:60]
            for text in found:
                numbers[intent].append(len(corpus))
                corpus.append(text)
            queries += [(text, intent) for text in asked]
    return corpus, [(text, numbers[intent]) for text, intent in queries]


def prepare(data, output):
    draw = random.Random(0)
    output.mkdir(parents=True, exist_ok=True)
    titles = sorted(title for title, _ in wikipedia(data / "text/wikipedia"))
    asked = {title.replace("_", " ") for title, _, _ in squad(data / "question_answering/squad-v1-dev.json")}
    held_articles = set(draw.sample(titles, 150)) | asked
    intents = [intent for intent, _ in requests(data / "classification")]
    held_intents = set(draw.sample(intents, 45))
    pairs = training_pairs(data, held_articles, held_intents, draw)
    for name, found in pairs.items():
        rows = [{"query": query, "document": document} for query, document in found if query and document]
        write_json_lines(output / f"{name}.jsonl", draw.sample(rows, len(rows))[: MOST.get(name)])
    draw = random.Random(1)
    rows = ranked_intents(data, held_intents, draw)
    write_json_lines(output / "ranked-intents.jsonl", draw.sample(rows, len(rows)))
    sets = {
        "squad": squad_set(data),
        "sections": sections_set(data, held_articles, random.Random(2)),
        "intents": intents_set(data, held_intents, random.Random(3)),
    }
    for name, (corpus, queries) in sets.items():
        folder = output / "sets" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json_lines(folder / "documents.jsonl", [{"text": text} for text in corpus])
        write_json_lines(folder / "queries.jsonl", [{"text": text, "right": right} for text, right in queries])


# Evaluation


def by_index(folder, documents, queries, sentence, reranker, reranked):
    """Rankings by name, of an index with the sentence encoder: words, vectors, both, and both reranked."""
    from modernbert.indexing import build_index, open_index

    build_index(documents, folder, sentence, passage_tokens=480)
    index = open_index(folder)
    found = {}
    ways = [("words (BM25)", {"by": "words"}), ("dense", {"by": "vectors"}), ("words + dense", {"by": "both"})]
    for name, options in ways:
        found[name] = [rows_of(index.search(query, top_k=100, **options)) for query in queries]
    if reranker is not None:
        index = open_index(folder, reranker=reranker)
        found["words + dense, reranked"] = [
            rows_of(index.search(query, top_k=reranked, reranked=reranked)) for query in queries
        ]
    return found


def rows_of(results):
    """Numbers of documents with their scores, the best first; the best passage of a document counts."""
    found = {}
    for result in results:
        found.setdefault(result.row - 1, result.score)
    return list(found.items())


def by_vectors(task, model, documents, queries):
    """The best documents by a model alone."""
    import numpy as np

    from modernbert import pipeline

    serve = pipeline(task, model, dtype="float32")
    if task == "sparse-embedding":
        asked, known = serve.csr(queries, is_query=True), serve.csr(documents, is_query=False)
        scores = (asked @ known.T).toarray()
        print(f"  weights: {asked.nnz / asked.shape[0]:.0f} a query, {known.nnz / known.shape[0]:.0f} a document")
    else:
        known = serve(documents, is_query=False)
        scores = serve.similarity(serve(queries, is_query=True), known)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :100]
    return [list(zip(best.tolist(), own[best].tolist(), strict=True)) for best, own in zip(order, scores, strict=True)]


def fused(weights, *rankings):
    """Lists of scores that are scaled to 0 to 1 and added up, as `modernbert search` does it."""
    out = []
    for lists in zip(*rankings, strict=True):
        scores = defaultdict(float)
        for weight, found in zip(weights, lists, strict=True):
            lowest, highest = (found[-1][1], found[0][1]) if found else (0, 0)
            for number, score in found:
                scores[number] += weight * ((score - lowest) / (highest - lowest) if highest > lowest else 1)
        out.append(sorted(scores.items(), key=lambda found: (-found[1], found[0])))
    return out


def metrics(rankings, rights):
    """Mean recall (of at most ten) and nDCG at 10."""
    recalls, gains = [], []
    for found, right in zip(rankings, rights, strict=True):
        hits = [number in right for number, _ in found[:10]]
        most = min(10, len(right))
        recalls.append(sum(hits) / most)
        best = sum(1 / math.log2(rank + 2) for rank in range(most))
        gains.append(sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits)) / best)
    return sum(recalls) / len(recalls), sum(gains) / len(gains)


def table(given):
    lines = defaultdict(list)
    for name in given.set:
        folder = given.data / "sets" / name
        documents = [row["text"] for row in read_json_lines(folder / "documents.jsonl")]
        asked = read_json_lines(folder / "queries.jsonl")
        if given.queries:
            asked = random.Random(0).sample(asked, min(given.queries, len(asked)))
        queries, rights = [row["text"] for row in asked], [set(row["right"]) for row in asked]
        print(f"{name}: {len(queries):,} queries, {len(documents):,} documents", flush=True)
        with tempfile.TemporaryDirectory() as place:
            path = folder / "documents.jsonl"
            found = by_index(Path(place) / "index", path, queries, given.sentence, given.reranker, given.reranked)
        for kind, task, model in (
            ("sparse", "sparse-embedding", given.sparse),
            ("multi-vector", "late-interaction", given.late),
        ):
            if model is not None:
                found[kind] = by_vectors(task, model, documents, queries)
                found[f"words + {kind}"] = fused((1, 1), found["words (BM25)"], found[kind])
        for way, rankings in found.items():
            recall, gain = metrics(rankings, rights)
            lines[way].append((recall, gain))
            print(f"  {way:<32} recall {recall:.3f}  nDCG {gain:.3f}", flush=True)
    print()
    print("| | " + " | ".join(f"{name}: recall, nDCG at 10" for name in given.set) + " |")
    print("|---" * (1 + len(given.set)) + "|")
    for way, found in lines.items():
        print(f"| {way} | " + " | ".join(f"{recall:.3f}, {gain:.3f}" for recall, gain in found) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("data", type=Path)
    preparing.add_argument("output", type=Path)
    comparing = commands.add_parser("table")
    comparing.add_argument("data", type=Path, help="what prepare wrote")
    comparing.add_argument("--set", nargs="+", default=["squad", "sections", "intents"])
    comparing.add_argument("--queries", type=int, help="take so many of a set, drawn at random; default: all")
    comparing.add_argument("--sentence", help="sentence encoder; default: the package's")
    comparing.add_argument("--late", help="late-interaction encoder")
    comparing.add_argument("--sparse", help="sparse encoder")
    comparing.add_argument("--reranker", help="cross-encoder")
    comparing.add_argument("--reranked", type=int, default=30, help="documents that the reranker reads")
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.data, given.output)
    else:
        table(given)


if __name__ == "__main__":
    main()
