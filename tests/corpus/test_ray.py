"""The engine of a Ray cluster: the bits of a notebook, actors that are lost, and what cannot be reached."""

import os
import random
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import pyarrow as pa
import pytest

from modernbert import corpus
from modernbert.corpus import CorpusError, Settings
from modernbert.corpus.contract import ATTEMPTS, Unit, make_engine
from modernbert.corpus.output import Output
from modernbert.corpus.work import RUN, Work, unit_of
from modernbert.errors import InputError
from tests.clusters import children, ray_here
from tests.corpus.conftest import TEXTS
from tests.corpus.test_one_result import check_ended, check_resumed, killed_after

pytestmark = [pytest.mark.network, pytest.mark.filterwarnings("ignore")]  # Ray's, which are not ours to mend


def test_without_ray_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"the engine ray needs ray: pip install 'modernbert\[ray\]'"):
        make_engine("ray", {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"actors": 0}, "actors is 0; it must be a whole number of at least 1"),
        ({"cpus": 0}, "cpus is 0; it must be a number above 0"),
        ({"horses": 2}, "the engine ray has no option horses; there are address, actors, cpus"),
    ],
)
def test_wrong_options_are_one_line(given, said):
    with pytest.raises(InputError) as error:
        make_engine("ray", given)
    assert said in str(error.value)


@pytest.fixture(scope="module")
def ray():
    pytest.importorskip("ray", reason="needs ray: pip install ray")
    with ray_here() as here:
        yield here


@pytest.fixture
def not_started(monkeypatch):
    ray = pytest.importorskip("ray", reason="needs ray: pip install ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def said_of(address, **options):
    """The line for a cluster that cannot be reached, and the seconds until it came."""
    begun = time.monotonic()
    with pytest.raises(CorpusError) as error:
        next(make_engine("ray", {"address": address, **options}).run(iter(()), print))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"the Ray cluster at {address} cannot be used: ")
    return str(error.value), time.monotonic() - begun


def test_a_cluster_that_is_not_there_is_one_line_at_once(not_started):
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        line, seconds = said_of(address)
        assert "Connection refused" in line
        assert seconds < 5
    assert "it must be HOST:PORT, ray://HOST:PORT or auto" in said_of("nowhere")[0]


def test_a_server_that_is_no_cluster_is_one_line_in_time(not_started):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        line, seconds = said_of(f"127.0.0.1:{other.getsockname()[1]}", timeout=3)
    assert line.endswith("it does not answer as Ray does within 3 seconds")
    assert seconds < 15


def test_an_instance_that_cannot_be_started_here_is_one_line(monkeypatch):
    def init(*given, **options):
        raise Exception("The current node timed out\nduring startup.")  # what Ray raises on a busy machine

    fake = types.SimpleNamespace(init=init, is_initialized=lambda: False)
    fake.exceptions = types.SimpleNamespace(RayError=LookupError)
    monkeypatch.setitem(sys.modules, "ray", fake)
    said = (
        r"^no Ray instance can be started here: The current node timed out during startup\.; the same call continues$"
    )
    with pytest.raises(CorpusError, match=said):
        next(make_engine("ray", {}).run(iter(()), print))


@pytest.mark.parametrize("actors", [1, 2])
def test_actors_give_the_notebooks_bits(ray, run, tmp_path, notebook, actors):
    report = run(shard_size=20, engine="ray", engine_options=[f"actors={actors}"])
    assert (report.texts, report.failed) == (len(TEXTS), 0)
    assert corpus.digest(tmp_path / "out") == notebook
    assert corpus.verify(tmp_path / "out", sample=5).ok
    check_ended(children(title="ray::_Actor"), 30)  # Ray ends them when it comes to it


def work_and_units(model, tmp_path, size):
    settings, output = Settings("sentence-embedding", str(model)), Output(str(tmp_path / "out"))
    output.write_json(RUN, {"run": "a"})
    keys = settings.keys([(text,) for text in TEXTS])
    table = pa.table({"key": pa.array(keys, pa.binary(32)), "text": TEXTS})
    return Work(settings, output, "a"), [unit_of(table.slice(i, size)) for i in range(0, len(TEXTS), size)]


def test_an_actor_that_is_killed_in_mid_shard_is_replaced_and_changes_no_bit(ray, model, tmp_path, notebook):
    work, units = work_and_units(model, tmp_path, 40)
    engine = make_engine("ray", {"actors": 1})
    records = []
    for record in engine.run(iter(units), SlowWork(work)):
        records.append(record)
        if len(records) == 1:
            until = time.monotonic() + 30
            while not list((tmp_path / "out" / "work").glob("*.begun")):  # it is in the middle of the next one
                assert time.monotonic() < until
                time.sleep(0.01)
            (killed,) = engine.workers
            os.kill(killed, signal.SIGKILL)
        elif len(records) == 2:
            assert killed not in engine.workers
    assert sorted(record["name"] for record in records) == sorted(unit.name for unit in units)
    assert sum(record["texts"] for record in records) == len(TEXTS)
    assert corpus.digest(tmp_path / "out") == notebook


class SlowWork:
    """Work that takes a second longer, and leaves word of it."""

    def __init__(self, work):
        self.work = work

    def prepare(self):
        self.work.prepare()

    def __call__(self, unit):
        mark = Path(self.work.output.path(f"work/{unit.name}.begun"))
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        time.sleep(1)
        mark.unlink()
        return self.work(unit)


class Plain:
    """Work without a model."""

    def __init__(self, folder=""):
        self.folder = folder

    def prepare(self):
        pass

    def __call__(self, unit):
        return {"name": unit.name}


UNITS = [Unit(f"part-{i}", None) for i in range(12)]


class Unloadable(Plain):
    def prepare(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Plain):
    def __call__(self, unit):
        os.kill(os.getpid(), signal.SIGKILL)


class Full(Plain):
    def __call__(self, unit):
        raise CorpusError("no space left; the same call continues")


class Straggling(Plain):
    """The first that computes the third unit takes much longer than others."""

    def __call__(self, unit):
        mark = Path(self.folder) / unit.name
        is_first = not mark.exists()
        with mark.open("a") as file:
            file.write("x")
        time.sleep(60 if unit.name == "part-3" and is_first else 0.1)
        return {"name": unit.name}


def test_actors_that_are_lost_with_the_model_end_the_job_with_one_line(ray):
    with pytest.raises(CorpusError) as error:
        list(make_engine("ray", {"actors": 1}).run(iter(UNITS), Unloadable()))
    assert str(error.value).startswith("an actor that loads the model was lost 3 times: ")
    assert str(error.value).endswith("let fewer actors run, and the same call continues")
    assert "\n" not in str(error.value)


def test_a_unit_that_ends_every_actor_is_given_up_with_one_line(ray, monkeypatch):
    monkeypatch.setattr("modernbert.corpus.ray.ATTEMPTS", 3)
    assert ATTEMPTS > 3
    with pytest.raises(CorpusError) as error:
        list(make_engine("ray", {"actors": 1}).run(iter(UNITS[:1]), Deadly()))
    assert str(error.value).startswith("the actors that computed part-0 were lost 3 times: ")
    assert "\n" not in str(error.value)


def test_what_the_work_raises_ends_the_job_as_it_is(ray):
    with pytest.raises(CorpusError) as error:
        list(make_engine("ray", {"actors": 1}).run(iter(UNITS), Full()))
    assert str(error.value) == "no space left; the same call continues"


def test_actors_that_find_no_room_are_one_line_in_time(ray):
    begun = time.monotonic()
    with pytest.raises(CorpusError) as error:
        list(make_engine("ray", {"actors": 1, "cpus": 64, "timeout": 2}).run(iter(UNITS), Plain()))
    assert "each needs 64 CPUs, and the cluster has 2 CPUs and 0 GPUs free" in str(error.value)
    assert time.monotonic() - begun < 20


def test_idle_actors_compute_what_takes_long_and_each_unit_counts_once(ray, tmp_path):
    engine = make_engine("ray", {"actors": 2})
    begun = time.monotonic()
    records = [record["name"] for record in engine.run(iter(UNITS), Straggling(str(tmp_path)))]
    assert time.monotonic() - begun < 50
    assert sorted(records) == sorted(unit.name for unit in UNITS)
    begun_often = {file.name for file in tmp_path.iterdir() if len(file.read_text()) > 1}
    assert begun_often == {"part-3"}


def test_units_are_read_as_they_are_needed(ray):
    read = []

    def units():
        for unit in UNITS:
            read.append(unit)
            yield unit

    records = make_engine("ray", {"actors": 1}).run(units(), Plain())
    next(records)
    assert len(read) <= 3
    records.close()
    assert threading.active_count() < 50
    assert len(read) <= 3


@pytest.mark.slow  # starts seven actors, one after another
def test_the_text_that_kills_its_actor_is_found_and_the_others_are_answered(ray, model, tmp_path):
    work, units = work_and_units(model, tmp_path, 160)
    (record,) = make_engine("ray", {"actors": 1}).run(iter(units), Poisoned(work))
    assert (record["texts"], record["failed"]) == (len(TEXTS) - 1, 1)


class Poisoned:
    """Work that a text ends."""

    def __init__(self, work):
        self.work = work

    def prepare(self):
        self.work.prepare()

    def __call__(self, unit):
        transform = self.work.transform

        class Deadly:
            schema, machine = transform.schema, transform.machine
            prepare = staticmethod(transform.prepare)

            def __call__(self, table):
                if TEXTS[70] in table["text"].to_pylist():
                    os.kill(os.getpid(), signal.SIGKILL)
                return transform(table)

        self.work.transform = Deadly()
        try:
            return self.work(unit)
        finally:
            self.work.transform = transform


STORE = "store=100000000"  # bytes, of an instance of a job's own


@pytest.mark.slow  # starts an instance of its own, whose last processes notice after a minute that the others are gone
def test_a_job_that_is_killed_leaves_no_process_and_continues(run, model, folder, tmp_path, notebook):
    pytest.importorskip("ray", reason="needs ray: pip install ray")
    engine = {"engine": "ray", "engine_options": ["actors=1", STORE]}
    started = killed_after(5, folder, tmp_path / "out", model, engine)
    assert len(started) > 3
    check_ended(started, 180)
    assert 0 < run(shard_size=16).computed < len(TEXTS)
    assert corpus.digest(tmp_path / "out") == notebook


@pytest.mark.slow  # starts five of them
def test_a_job_that_is_killed_five_times_has_the_same_bits(run, tmp_path, model):
    pytest.importorskip("ray", reason="needs ray: pip install ray")
    engine = {"engine": "ray", "engine_options": ["actors=2", STORE]}
    moments = sorted(random.Random(4).sample(range(1, 100), 5))
    check_ended(check_resumed(run, tmp_path / "in", tmp_path / "out", model, engine, moments), 180)
