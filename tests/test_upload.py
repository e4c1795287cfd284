"""Uploading through the real client to a real server that fails in every way: done, or one clear sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm.config import UserError
from pipelines.publishing import upload as uploading
from pipelines.publishing.upload import HubSession, entry, manifest_text, upload
from tests.hub import ENDPOINTS, Hub
from tests.support import ROOT

NAME, TOKEN = "tester/model", "hf_test_write"
CONTENT = {
    "README.md": b"---\nlicense: mit\n---\n# A model, described at some length, so that half of it can be cut off\n",
    "model_index.json": b'{"_class_name": "LatentDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}\n',
    "unet/diffusion_pytorch_model.safetensors": bytes(range(256)) * 500,
    "vae/diffusion_pytorch_model.safetensors": bytes(range(255)) * 100,
}
USED = [name for name in ENDPOINTS if name != "tree"]


@pytest.fixture(autouse=True)
def quiet_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def hub(tmp_path: Path):
    with Hub(tmp_path / "hub", chunk=50_000) as served:
        yield served


def release(folder: Path, content: dict[str, bytes] = CONTENT) -> dict[str, dict]:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    files = {name: entry(folder / name) for name in sorted(content)}
    (folder / "manifest.json").write_text(manifest_text(files))
    return files


def sent(hub: Hub, folder: Path, content: dict[str, bytes] = CONTENT, token: str = TOKEN, **how) -> str:
    session = HubSession(NAME, token, hub.endpoint)
    return upload(folder, release(folder, content), session, private=how.get("private", False))


def holds(hub: Hub, content: dict[str, bytes] = CONTENT) -> bool:
    tree = hub.tree(NAME)
    return all(hub.blob(tree[name]).read_bytes() == data for name, data in content.items())


def published_nothing(hub: Hub) -> bool:
    return NAME not in hub.repos or hub.commits(NAME) == 1


@pytest.mark.parametrize("endpoint", USED)
def test_a_passing_fault_at_any_endpoint_is_survived(hub: Hub, tmp_path: Path, endpoint: str) -> None:
    hub.fail(endpoint, status=503)
    sent(hub, tmp_path / "release")
    assert holds(hub) and hub.commits(NAME) == 2
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.parametrize(
    ("endpoint", "fault"),
    [
        ("commit", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("put", {"status": 500}),
        ("commit", {"cut": True}),
        ("part", {"cut": True}),
        ("object", {"cut": True}),
        ("get", {"cut": True}),
        ("object", {"corrupt": True}),
        ("commit", {"delay": 1.0}),
    ],
)
def test_faults_of_other_kinds_are_survived(hub: Hub, tmp_path: Path, endpoint: str, fault: dict) -> None:
    hub.fail(endpoint, **fault)
    sent(hub, tmp_path / "release")
    assert holds(hub) and hub.commits(NAME) == 2


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("endpoint", ["whoami", "create", "preupload", "batch", "commit"])
def test_what_is_forbidden_is_said_at_once(hub: Hub, tmp_path: Path, endpoint: str, status: int) -> None:
    hub.fail(endpoint, status=status, times=99)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"\({status}\).*token") as failed:
        sent(hub, tmp_path / "release")
    assert TOKEN not in str(failed.value) and "\n" not in str(failed.value)
    assert published_nothing(hub) and time.monotonic() - began < 10


@pytest.mark.parametrize(("endpoint", "fault"), [("commit", {"status": 503}), ("put", {"status": 500})])
def test_a_lasting_fault_is_one_sentence_and_main_stays_as_it_was(
    hub: Hub, tmp_path: Path, endpoint: str, fault: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "PATIENCE", 2.0)
    hub.fail(endpoint, times=999, **fault)
    with pytest.raises(UserError, match="Run the same command again later") as failed:
        sent(hub, tmp_path / "release")
    assert "\n" not in str(failed.value) and published_nothing(hub)
    hub.faults.clear()
    sent(hub, tmp_path / "release")
    assert holds(hub)


def test_a_hub_that_asks_to_wait_for_long_is_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.fail("preupload", status=429, times=99, headers={"Retry-After": "300"})
    with pytest.raises(UserError, match="asks to wait for 300 seconds"):
        sent(hub, tmp_path / "release")


def test_a_hub_that_does_not_answer_is_given_up(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "ANSWER", 0.3)
    monkeypatch.setattr(uploading, "PATIENCE", 1.0)
    hub.fail("commit", delay=5.0, times=99)
    with pytest.raises(UserError, match="Uploading failed"):
        sent(hub, tmp_path / "release")


def test_what_comes_back_as_something_else_is_not_believed(hub: Hub, tmp_path: Path) -> None:
    hub.fail("object", corrupt=True, times=99)
    with pytest.raises(UserError, match="came back from the hub twice as something else"):
        sent(hub, tmp_path / "release")


def test_publishing_again_sends_what_changed_and_removes_what_went(hub: Hub, tmp_path: Path) -> None:
    sent(hub, tmp_path / "one")
    hub.commit(NAME, [{"key": "file", "value": {"path": "notes.md", "content": "aGk="}}])
    hub.requests.clear()
    changed = {**CONTENT, "README.md": CONTENT["README.md"] + b"More.\n"}
    del changed["vae/diffusion_pytorch_model.safetensors"]
    sent(hub, tmp_path / "two", changed)
    assert set(hub.tree(NAME)) == {*changed, "manifest.json", ".gitattributes", "notes.md"}
    assert not [request for request in hub.requests if request.endpoint in ("put", "part")]


def test_a_repository_of_the_other_visibility_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    hub.create(NAME, private=False)
    with pytest.raises(UserError, match="is there and public, but is to be published private"):
        sent(hub, tmp_path / "release", private=True)
    assert published_nothing(hub)


def test_a_private_model_can_be_read_back(hub: Hub, tmp_path: Path) -> None:
    sent(hub, tmp_path / "release", private=True)
    assert hub.repos[NAME]["private"] and holds(hub)


def test_a_token_that_may_only_read_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"failed \(403\): the token may not do that"):
        sent(hub, tmp_path / "release", token="hf_test_read")


UPLOAD = """
import sys
from pathlib import Path
from tests.test_upload import *
release_ = Path(sys.argv[1])
upload(release_, release(release_), HubSession(NAME, TOKEN), private=False)
"""


def test_killed_while_uploading_and_run_again_it_is_complete(hub: Hub, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", UPLOAD, str(tmp_path / "release")]
    hub.fail("complete", delay=30.0)  # of the larger file: the smaller one is through
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    small = entry_of("vae/diffusion_pytorch_model.safetensors", tmp_path)
    while not (hub.blob(small).exists() and any(r.endpoint == "complete" for r in hub.requests)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert published_nothing(hub)
    hub.requests.clear()
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    assert holds(hub) and hub.commits(NAME) == 2
    assert not [r for r in hub.requests if r.endpoint == "put"], "what was through is not sent again"


def entry_of(name: str, tmp_path: Path) -> str:
    return release(tmp_path / "again")[name]["sha256"]


def test_the_token_goes_to_the_hub_alone_and_is_in_no_log(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    hub.fail("batch", status=500)
    hub.fail("commit", cut=True)
    sent(hub, tmp_path / "release")
    printed = "".join(capfd.readouterr())
    assert TOKEN not in caplog.text + printed
    own = hub.endpoint.removeprefix("http://")
    assert {request.host for request in hub.requests if request.token} == {own}
    elsewhere = [request for request in hub.requests if request.host != own]
    assert elsewhere and not any(TOKEN in r.headers + r.path or TOKEN.encode() in r.body for r in elsewhere)
    assert not any(TOKEN in r.path or TOKEN.encode() in r.body for r in hub.requests)
