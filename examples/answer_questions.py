"""Find the sentence of some documents that answers a question: search, rerank, answer.

An index proposes passages quickly, because their vectors and words are stored. A reranker compares the question with
each of the few proposed ones more closely, which is slower and more precise; at the end it ranks the sentences of the
best passage.

    pip install '.[search]'
    python examples/answer_questions.py
    python examples/answer_questions.py "When is breakfast served?"    # questions of your own about the guest house

It takes six seconds on two processor cores, and prints:

    Who pays for a repair of the boiler?
        A repair of the boiler is paid by the owner. (heating.md)
    What is the network called?
        The network is called Guests, and its password hangs behind the door of every room. (internet.md)
    How much is a room in November?
        A room is 70 euros a night, and 60 from November to March. (money.md)
    Where is the nearest vet?
        The nearest vet is in the village, beside the chemist. (dogs.md)
    When does the lorry come?
        The lorry comes on Tuesday at six in the morning, so put the bins at the street on Monday night. (rubbish.md)
    Where can I park my car?
        ...

The models are the small ones of the package, a sentence encoder and a multi-vector encoder, which compares words. The
questions were picked from thirteen that were tried, of which eleven were answered; the last one was not.

In earnest take `model="Alibaba-NLP/gte-modernbert-base"` for the index and
`pipeline("text-ranking", "Alibaba-NLP/gte-reranker-modernbert-base")`. A model of question-answering, such as
`rankyx/ModernBERT-QnA-base-squad`, gives the words of the answer instead of its sentence.
"""

import re
import sys
import tempfile
from pathlib import Path

from modernbert import pipeline
from modernbert.indexing import build_index, open_index

FOLDER = Path(__file__).parent / "data" / "guesthouse"
QUESTIONS = [
    "Who pays for a repair of the boiler?",
    "What is the network called?",
    "How much is a room in November?",
    "Where is the nearest vet?",
    "When does the lorry come?",
    "Where can I park my car?",
]


def main(*questions: str) -> None:
    rank = pipeline("text-ranking")
    with tempfile.TemporaryDirectory() as place:  # a real index stays on the disk
        build_index(FOLDER, Path(place) / "index")
        index = open_index(Path(place) / "index")
        for question in questions or QUESTIONS:
            found = index.search(question, top_k=4)
            best = rank(question, [one.text for one in found])[0]
            text = " ".join(best["text"].partition("\n\n")[2].split())  # without the heading
            sentences = re.split(r"(?<=[.?!]) ", text)
            answer = rank(question, sentences)[0]
            print(f"{question}\n    {answer['text']} ({Path(found[best['index']].path).name})")


if __name__ == "__main__":
    main(*sys.argv[1:])
