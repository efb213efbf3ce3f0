"""Serve models over HTTP, and ask them as any program would.

The server runs in a process of its own and answers in the shapes that clients of OpenAI, Cohere and
text-embeddings-inference know. This script starts it at a free port, sends three requests with nothing but Python's
standard library, and stops it. To keep a server running: `modernbert serve`, and look at http://localhost:8000.

    pip install '.[serve,search]'
    python examples/serve_demo.py

It takes ten seconds on two processor cores, and prints:

    POST /v1/embeddings: 2 vectors of 256 numbers
    POST /v2/rerank: A dog barked.
    POST /v1/search: heating.md
    SIGTERM: the server ended with 0

These are the small models of the package. `modernbert serve --model Alibaba-NLP/gte-modernbert-base --model
rank=Alibaba-NLP/gte-reranker-modernbert-base` serves models of the Hub by the same paths.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from modernbert.indexing import build_index

FOLDER = Path(__file__).parent / "data" / "guesthouse"


def ask(url: str, path: str, **body: object) -> dict:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        build_index(FOLDER, Path(place) / "notes")
        command = [sys.executable, "-m", "modernbert", "serve", "--port", "0", "--no-access-log", "--index", "notes"]
        server = subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True)
        try:
            lines = iter(server.stderr.readline, "")
            url = next(line for line in lines if " at http" in line).split()[-1]

            reply = ask(url, "/v1/embeddings", input=["A dog barked.", "Prices rose."])
            vectors = [one["embedding"] for one in reply["data"]]
            print(f"POST /v1/embeddings: {len(vectors)} vectors of {len(vectors[0])} numbers")

            documents = ["Prices rose.", "A dog barked."]
            reply = ask(url, "/v2/rerank", query="a dog", documents=documents, top_n=1)
            print("POST /v2/rerank:", documents[reply["results"][0]["index"]])

            reply = ask(url, "/v1/search", query="who pays the plumber?", top_k=1)
            print("POST /v1/search:", Path(reply["results"][0]["path"]).name)
        finally:
            server.terminate()
            print("SIGTERM: the server ended with", server.wait())
            server.stderr.close()


if __name__ == "__main__":
    main()
