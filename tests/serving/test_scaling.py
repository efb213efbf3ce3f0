"""Replicas on a Ray cluster scale by the tokens that wait. A file of its own: a process has one Ray instance."""

import asyncio
import time

import httpx
import pytest

pytest.importorskip("fastapi")

from tests.clusters import children
from tests.serving.test_replicas import REPLICA, WORDS, served

pytestmark = [pytest.mark.network, pytest.mark.filterwarnings("ignore")]  # Ray's, which are not ours to mend


@pytest.mark.slow  # Ray Serve asks for waiting tokens every ten seconds
def test_a_replica_starts_where_more_waits_than_one_computes():
    pytest.importorskip("ray.serve", reason="needs ray: pip install 'ray[serve]'")
    with served(max_replicas=2, target_waiting=200, upscale_delay=0) as url:
        assert len(children(title=REPLICA)) == 1

        async def load(until):
            async with httpx.AsyncClient(base_url=url, timeout=120) as http:

                async def client():
                    while time.monotonic() < until and len(children(title=REPLICA)) < 2:
                        reply = await http.post("/v1/embeddings", json={"input": [" ".join(WORDS * 6)] * 4})
                        assert reply.status_code == 200

                await asyncio.gather(*(client() for _ in range(16)))

        asyncio.run(load(time.monotonic() + 120))
        assert len(children(title=REPLICA)) == 2
