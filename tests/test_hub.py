"""From a name to a folder: local, demo, the hub's cache, the hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import eightfold.hub
from eightfold.checkpoint import resolve
from eightfold.types import EightfoldError


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"
    (tmp_path / "weights.bin").touch()
    with pytest.raises(EightfoldError, match="is a file"):
        resolve("weights.bin")


@pytest.mark.parametrize(
    "name", ["/no/such", "./a/b", "../b", "~/nothing-here", "a/b/c", "mixtral", "", "~nobody-of-this-name/a", "a b/c"]
)
def test_what_looks_like_a_folder_is_not_looked_for_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(EightfoldError, match="no such folder"):
        resolve(name)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eightfold.hub, "__file__", str(tmp_path / "hub.py"))
    with pytest.raises(EightfoldError, match="lacks the demo model"):
        resolve("demo")
    (tmp_path / "assets" / "demo").mkdir(parents=True)
    assert resolve("demo") == tmp_path / "assets" / "demo"


class FakeHub:
    """Stands for snapshot_download: a repository of files, of which the patterns choose."""

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder, self.files = folder, files
        self.calls: list[dict[str, Any]] = []

    def __call__(self, name: str, **options: Any) -> str:
        self.calls.append({"name": name, **options})
        chosen = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
        )
        for file in chosen:
            path = self.folder / file
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return str(self.folder)

    def downloaded(self) -> set[str]:
        return {path.name for path in self.folder.rglob("*") if path.is_file()}


def test_one_form_of_the_weights_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = ("config.json", "params.json", "tokenizer.json", "tokenizer.model.v3", "chat_template.jinja")
    unwanted = ("README.md", "pytorch_model.bin", "gguf/model.safetensors", "consolidated.00.pt")
    shards = ("model-00001-of-00001.safetensors", "model.safetensors.index.json")
    hub = FakeHub(tmp_path, *described, *unwanted, *shards, "consolidated.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve("mistralai/Mixtral-8x22B-v0.3") == tmp_path
    assert hub.downloaded() == {*described, *shards}
    assert [call["local_files_only"] for call in hub.calls] == [False]


def test_a_tokenizer_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path, "tokenizer.json", "tokenizer_config.json", "model.safetensors", "consolidated.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    resolve("org/name", weights=False)
    assert hub.downloaded() == {"tokenizer.json", "tokenizer_config.json"}


def test_mistral_form_where_there_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("params.json", "tokenizer.model", "consolidated-00001-of-00001.safetensors")
    hub = FakeHub(tmp_path, *files, "consolidated.safetensors.index.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    resolve("org/name", download=False)
    assert hub.downloaded() == {*files, "consolidated.safetensors.index.json"}
    assert all(call["local_files_only"] for call in hub.calls)


@pytest.mark.parametrize(
    "files",
    [
        ("pytorch_model.bin",),
        ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
        ("consolidated.00.pth", "params.json"),
    ],
)
def test_pickles_are_not_downloaded(files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path, "config.json", *files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(EightfoldError, match=r"no safetensors with weights of org/name .* --allow-pickle"):
        resolve("org/name")
    assert not any(name.endswith((".bin", ".pth")) for name in hub.downloaded())
    (tmp_path / files[0]).touch()  # somebody has brought them into the cache
    assert resolve("org/name") == tmp_path


def fill_cache(cache: Path) -> Path:
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).touch()
    return snapshot


def test_the_cache_is_enough_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill_cache(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **o: real(name, cache_dir=tmp_path, **o))
    for download in (True, False):
        assert resolve("org/name", download) == snapshot
        with pytest.raises(EightfoldError, match="org/other is neither a folder here nor in the hub's cache") as caught:
            resolve("org/other", download)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, "org/name is gated: accept its terms"),
        (errors.RepositoryNotFoundError, "neither a folder here nor a model on the hub"),
        (errors.LocalEntryNotFoundError, "nor in the hub's cache"),
        (errors.OfflineModeIsEnabled, "nor in the hub's cache"),
        (ConnectionError, "cannot get org/name from the hub: ConnectionError: line one line two"),
    ],
)
def test_errors_of_the_hub_are_one_line(kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = kind.__new__(kind)
    error.args = ("line one\n\nline two",)

    def fail(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(EightfoldError, match=words) as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


def test_config_and_names_load_no_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import eightfold.config, eightfold.hub; "
        "assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(eightfold.hub.__file__).parents[1])], check=True)
