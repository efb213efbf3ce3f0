"""Checkpoints from the Hub: over HTTP on loopback, from its cache, and every way that it can say no."""

import pytest
import torch

from modernbert import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, ModernBertForMaskedLM
from modernbert.errors import CheckpointError, NotFoundError
from modernbert.io.hub import Source
from modernbert.training.pretraining.train_tokenizer import save_tokenizer, train_tokenizer
from tests.hub_server import COMMIT, Hub, write_cache

pytestmark = pytest.mark.network


@pytest.fixture
def files(small_model, tmp_path):
    """Content of a checkpoint folder, by file name."""
    folder = tmp_path / "saved"
    small_model.save_pretrained(folder)
    save_tokenizer(train_tokenizer(["some text to learn from"] * 3, 272), folder, 64)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def set_offline(monkeypatch, is_offline):
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    getattr(utils, "reset_sessions", lambda: None)()  # huggingface_hub below 1 asks when a session begins


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    hub = Hub()
    hub.repositories = {
        "owner/name": files,
        "owner/nested": {f"inner/{name}": content for name, content in files.items()},
        "owner/private": files,
        "owner/gated": files,
        "owner/pickle": {"config.json": files["config.json"], "pytorch_model.bin": b"\x80\x04"},
        "owner/empty": {"README.md": b"nothing"},
    }
    hub.private, hub.gated = {"owner/private"}, {"owner/gated"}
    with hub.serving() as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for module in (constants, file_download):  # huggingface_hub below 1 copies it at import
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        set_offline(monkeypatch, False)
        hub.cache = tmp_path / "cache"
        yield hub


def same(model, other):
    x = torch.tensor([[3, 4, 5, 6]])
    return torch.equal(model(x).logits, other(x).logits)


def test_download_then_offline(hub, small_model, monkeypatch):
    model = AutoModelForMaskedLM.from_pretrained("owner/name", cache_dir=hub.cache)
    assert isinstance(model, ModernBertForMaskedLM)
    assert same(model, small_model)
    assert AutoTokenizer.from_pretrained("owner/name", cache_dir=hub.cache).mask_token == "[MASK]"
    assert any(method == "GET" and path.endswith("model.safetensors") for method, path, _ in hub.requests)
    asked = len(hub.requests)
    again = AutoModelForMaskedLM.from_pretrained("owner/name", cache_dir=hub.cache, local_files_only=True)
    assert same(again, small_model)
    assert len(hub.requests) == asked
    set_offline(monkeypatch, True)
    assert same(AutoModelForMaskedLM.from_pretrained("owner/name", cache_dir=hub.cache), small_model)
    assert len(hub.requests) == asked


def test_revision_subfolder_and_token(hub, small_model):
    for revision in ("v1", COMMIT):
        model = AutoModelForMaskedLM.from_pretrained("owner/name", revision=revision, cache_dir=hub.cache)
        assert same(model, small_model)
    nested = AutoModelForMaskedLM.from_pretrained("owner/nested", subfolder="inner", cache_dir=hub.cache)
    assert same(nested, small_model)
    private = AutoModelForMaskedLM.from_pretrained("owner/private", token="secret", cache_dir=hub.cache)
    assert same(private, small_model)
    assert AutoConfig.from_pretrained("owner/name", cache_dir=hub.cache, num_labels=7).num_labels == 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name_or_folder": "owner/missing"}, NotFoundError, "no such repository on the Hub"),
        ({"name_or_folder": "owner/private", "token": False}, NotFoundError, "token="),
        ({"name_or_folder": "owner/gated"}, NotFoundError, "owner/gated is gated"),
        ({"name_or_folder": "owner/name", "revision": "v9"}, NotFoundError, "no revision 'v9'"),
        ({"name_or_folder": "owner/empty"}, NotFoundError, "repository owner/empty holds no config.json"),
        ({"name_or_folder": "owner/nested", "subfolder": "other"}, NotFoundError, "holds no config.json"),
        ({"name_or_folder": "owner/pickle"}, CheckpointError, "pytorch_model.bin, a pickle.*save_file"),
        ({"name_or_folder": "owner/name", "local_files_only": True}, NotFoundError, "no such model in the cache"),
        ({"name_or_folder": "foo--bar"}, NotFoundError, "cannot be a repository's id"),
        ({"name_or_folder": "./no such folder"}, NotFoundError, "neither a folder on this disk nor the id"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_every_no_is_one_clear_error(hub, arguments, error, message):
    name = arguments.pop("name_or_folder")
    with pytest.raises(error, match=message):
        AutoModelForMaskedLM.from_pretrained(name, cache_dir=hub.cache, **arguments)


def test_a_pickle_is_neither_downloaded_nor_opened(hub, small_model, tmp_path):
    with pytest.raises(CheckpointError, match="a pickle"):
        AutoModelForMaskedLM.from_pretrained("owner/pickle", cache_dir=hub.cache)
    small_model.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert not [r for r in hub.requests if r[0] == "GET" and r[1].endswith(".bin")]


@pytest.fixture
def _unreachable(monkeypatch):
    from huggingface_hub import constants

    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("_unreachable")
def test_an_unreachable_hub(tmp_path):
    with pytest.raises(NotFoundError, match="cannot be reached"):
        AutoConfig.from_pretrained("owner/name", cache_dir=tmp_path / "cache")


def test_a_cache_that_somebody_else_filled(files, small_model, tmp_path):
    write_cache(tmp_path / "cache", "owner/cached", files)
    model = AutoModelForMaskedLM.from_pretrained("owner/cached", cache_dir=tmp_path / "cache", local_files_only=True)
    assert same(model, small_model)


def test_file_names_that_lead_out_are_refused(tmp_path):
    for name in ("../secret", "/etc/passwd", "a/../../b", "..\\b"):
        with pytest.raises(CheckpointError, match="lies outside"):
            Source(tmp_path).find(name)


@pytest.mark.usefixtures("_unreachable")
def test_an_unreachable_hub_is_asked_once_a_file_that_the_cache_lacks(files, small_model, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    asked = []
    really = HfApi.file_exists
    monkeypatch.setattr(HfApi, "file_exists", lambda *args, **kwargs: asked.append(args[2]) or really(*args, **kwargs))
    write_cache(tmp_path / "cache", "owner/cached", files)
    assert same(AutoModelForMaskedLM.from_pretrained("owner/cached", cache_dir=tmp_path / "cache"), small_model)
    assert Source("owner/cached", cache_dir=tmp_path / "cache").find("modules.json") is None
    assert asked == ["adapter_config.json", "modules.json"]


def test_an_adapter_on_the_hub_without_a_base_is_refused_and_not_downloaded(hub):
    hub.repositories["owner/adapted"] = {**hub.repositories["owner/name"], "adapter_config.json": b"{}"}
    with pytest.raises(CheckpointError, match="owner/adapted holds an adapter"):
        AutoModelForMaskedLM.from_pretrained("owner/adapted", cache_dir=hub.cache)
    assert not [r for r in hub.requests if r[0] == "GET" and r[1].endswith(".safetensors")]


def test_what_is_pushed_can_be_loaded(hub, small_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained("owner/name", cache_dir=hub.cache)
    said = {"token": "secret", "commit_message": "first"}
    commit = small_model.push_to_hub("owner/new", **said, max_shard_size="20KB")
    assert (commit.oid, commit.commit_message) == (COMMIT, "first")
    tokenizer.push_to_hub("owner/new", token="secret", revision="v1")
    small_model.config.push_to_hub("owner/new", token="secret", private=True, create_pr=True)
    message = "Upload ModernBertConfig"
    assert hub.commits == [
        ("owner/new", "main", "first"), ("owner/new", "v1", "Upload Tokenizer"), ("owner/new", "main", message)
    ]  # fmt: skip
    assert same(ModernBertForMaskedLM.from_pretrained("owner/new", cache_dir=hub.cache), small_model)
    again = AutoTokenizer.from_pretrained("owner/new", cache_dir=hub.cache)
    assert again.get_vocab() == tokenizer.get_vocab()
    for thing in (small_model, small_model.config, tokenizer):
        files = thing.save_pretrained(tmp_path / "made", push_to_hub=True, repo_id="me/made", token="secret")
        assert all(hub.repositories["me/made"][file.split("/")[-1]] for file in files)
    with pytest.raises(CheckpointError, match=r"^owner/new was not pushed to the Hub, which wants token=\.\.\. .*401"):
        small_model.push_to_hub("owner/new", token="wrong")


def test_a_download_can_be_forced(hub):
    AutoConfig.from_pretrained("owner/name", cache_dir=hub.cache)
    before = len(hub.requests)
    assert AutoConfig.from_pretrained("owner/name", cache_dir=hub.cache, force_download=True).num_labels == 2
    assert len(hub.requests) > before
