"""A folder goes to the model hub in one commit, is downloaded again, and compared byte for byte.

The hub's own client (`huggingface_hub`) does the talking. What is added here: it stops waiting for a hub that does not
answer, the commit is retried, errors are sentences, and nothing is believed that was not read back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ldm.checkpoint import digest
from ldm.config import UserError

# The HTTP library of the hub's client, httpx2 or of old httpx: both may be installed, and only its own will do.
KINDS = (kind.__module__ for kind in HfHubHTTPError.__mro__)
httpx: Any = importlib.import_module(next(kind for kind in KINDS if kind.startswith("httpx")).split(".")[0])

MANIFEST = "manifest.json"
PATIENCE = 15.0  # seconds of nothing but failures, after which no other request is begun
ANSWER = 12.0  # seconds within which the hub has to begin to answer
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that may be gone at the next try

T = TypeVar("T")


def token_of_person() -> str:
    """The token from the environment (HF_TOKEN) or from `hf auth login`; UserError if there is none."""
    token = huggingface_hub.get_token()
    if not token:
        raise UserError("There is no token for the hub; set HF_TOKEN, or log in with: hf auth login")
    if huggingface_hub.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be published; unset it.")
    return token


class HubSession:
    """The hub, for one repository: a failure that may pass is tried again for `PATIENCE` seconds.

    The token is sent to the hub's host and to no other.
    """

    def __init__(self, name: str, token: str, endpoint: str | None = None) -> None:
        self.name, self.token = name, token
        self.api = HfApi(token=token, endpoint=endpoint)
        self._host = httpx.URL(self.api.endpoint).netloc
        self._thread = threading.local()  # the client uploads in several

    @contextlib.contextmanager
    def open(self) -> Iterator[HubSession]:
        """While open, the hub's client gives up on a hub that does not answer: by itself it waits for ever.

        Files go by plain HTTP: Xet (`hf_xet`) has a client of its own, which knows nothing of what is promised here
        about time, retries and the token.
        """
        xet, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
        huggingface_hub.set_client_factory(self._client)
        try:
            yield self
        finally:
            huggingface_hub.set_client_factory(lambda: httpx.Client(follow_redirects=True, timeout=None))
            constants.HF_HUB_DISABLE_XET = xet

    def _client(self) -> Any:
        hooks: dict[str, list[Callable[..., Any]]] = {"request": [self._before], "response": [self._after]}
        return httpx.Client(event_hooks=hooks, follow_redirects=True, timeout=ANSWER)

    def _before(self, request: Any) -> None:
        if request.url.netloc != self._host:
            request.headers.pop("authorization", None)
        asked = request.extensions.get("timeout", {})  # the client asks for no limit here and there
        request.extensions["timeout"] = {key: min(value or ANSWER, ANSWER) for key, value in asked.items()}
        now, state = time.monotonic(), self._thread
        if getattr(state, "unanswered", False):  # so the request before this one failed
            state.trouble = getattr(state, "trouble", None) or now
            if now - state.trouble > PATIENCE:
                raise UserError(self._tired(f"it has given nothing but errors for {PATIENCE:.0f} seconds"))
        state.unanswered = True

    def _after(self, response: Any) -> None:
        if response.status_code not in PASSING:
            self._thread.unanswered, self._thread.trouble = False, None
        wait = response.headers.get("retry-after", "")
        if response.status_code in PASSING and wait.isdigit() and int(wait) > PATIENCE:
            raise UserError(self._tired(f"it asks to wait for {wait} seconds"))

    def _tired(self, why: str) -> str:
        return (
            f"{self.api.endpoint} can't be used now: {why}. "
            "Run the same command again later; files that are uploaded are not uploaded again."
        )

    def call(self, what: str, function: Callable[[], T]) -> T:
        """`function()`, tried again after a pause while what went wrong may pass.

        Raises:
            UserError: it failed for good; says what was tried, why it failed, and what to do.
        """
        pause, failed = 1.0, None
        while True:
            self._thread.unanswered, self._thread.trouble = False, None
            try:
                return function()
            except (
                OSError,
                ValueError,
                RuntimeError,
                LookupError,
                httpx.HTTPError,
                EntryNotFoundError,
            ) as problem:
                if isinstance(problem.__cause__, UserError):  # from a thread of the client
                    raise problem.__cause__ from None
                status = status_of(problem)
                final = isinstance(problem, ValueError | LookupError)  # the client's: an answer it can't use
                passing = status in PASSING or (status is None and not final)
                failed = failed or time.monotonic()
                if not passing or time.monotonic() + pause - failed > PATIENCE:
                    raise UserError(self._sentence(what, status, problem)) from None
            time.sleep(pause)
            pause = min(2 * pause, 8.0)

    def _sentence(self, what: str, status: int | None, problem: Exception) -> str:
        todo = {
            401: "the hub does not accept the token; set HF_TOKEN to one with write permission, or run: hf auth login",
            403: f"the token may not do that; use one with write permission for {self.name.split('/')[0]}",
            404: f"the hub has no {self.name}, or no such file in it, or the token may not see it",
        }
        code = f" ({status})" if status else ""
        if status in todo:
            return f"{what} failed{code}: {todo[status]}."
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        again = "Run the same command again later; files that are uploaded are not uploaded again."
        return f"{what} failed{code}: {reason}. {again}".replace(self.token, "[token]")


def status_of(problem: BaseException | None) -> int | None:
    """The HTTP status behind an error, if one is."""
    while problem is not None:
        response = getattr(problem, "response", None)
        if response is not None:
            return int(response.status_code)
        problem = problem.__cause__ or problem.__context__
    return None


def upload(folder: Path, files: Mapping[str, Mapping[str, Any]], hub: HubSession, *, private: bool) -> str:
    """Put `files` of `folder` into the repository, in one commit, and compare what the hub then has.

    Files that an earlier publication put there and this one has not are removed in the same commit; files of
    others stay.

    Args:
        files: path -> {"sha256", "size"}: all that is sent, beside the manifest itself.

    Returns:
        The address of the commit.

    Raises:
        UserError: it can't be done; `main` is then as it was, unless the message says otherwise.
    """
    with hub.open():
        hub.call("Asking the hub who you are", hub.api.whoami)
        hub.call(
            f"Making the repository {hub.name}",
            lambda: hub.api.create_repo(hub.name, private=private, exist_ok=True),
        )
        about = hub.call(f"Looking at {hub.name}", lambda: hub.api.model_info(hub.name))
        if bool(about.private) != private:
            there, asked = ("private", "public") if about.private else ("public", "private")
            raise UserError(
                f"{hub.name} is there and {there}, but is to be published {asked}; change it in its settings, "
                f"{'give --private' if about.private else 'leave --private out'}, or choose another name."
            )
        stale = [path for path in published_before(hub) if path not in files]
        commit = hub.call("Uploading", lambda: commit_files(folder, files, stale, hub))
        compare({**files, MANIFEST: entry(folder / MANIFEST)}, commit.oid, hub)
    return str(commit.commit_url)


def published_before(hub: HubSession) -> list[str]:
    """What the manifest in the repository lists, if there is one."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = hub.call("Reading the last manifest", lambda: download(hub, MANIFEST, "main", scratch))
        except UserError as problem:
            if "(404)" in str(problem):
                return []
            raise
        try:
            return [str(path) for path in json.loads(found.read_text())["files"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{hub.name} has a {MANIFEST} that is not ours; choose another name, or remove it there."
            ) from None


def commit_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], stale: list[str], hub: HubSession
) -> Any:
    """One try: large files first, then the commit that shows all of them at once."""
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(folder / path))
        for path in [*files, MANIFEST]
    ]
    there = {s.rfilename for s in hub.api.model_info(hub.name).siblings or []}
    operations += [CommitOperationDelete(path_in_repo=path) for path in stale if path in there]
    return hub.api.create_commit(
        hub.name, operations, commit_message="Publish the model", revision="main", repo_type="model"
    )


def compare(files: Mapping[str, Mapping[str, Any]], revision: str, hub: HubSession) -> None:
    """Download every file of a commit and compare it with the manifest; each may be damaged once on its way."""
    for path, about in files.items():
        for last in (False, True):
            with tempfile.TemporaryDirectory() as scratch:
                read = functools.partial(download, hub, path, revision, scratch)
                same = entry(hub.call(f"Reading {path} back", read)) == about
            if same:
                break
            if last:
                raise UserError(
                    f"{path} came back from the hub twice as something else than was sent. The commit "
                    f"{revision[:8]} of {hub.name} is not to be trusted: publish again, or remove it there."
                )


def download(hub: HubSession, path: str, revision: str, scratch: str) -> Path:
    return Path(hub.api.hf_hub_download(hub.name, path, revision=revision, local_dir=scratch))


def entry(path: Path) -> dict[str, Any]:
    """A line of the manifest."""
    return {"sha256": digest(path), "size": path.stat().st_size}


def manifest_text(files: Mapping[str, Mapping[str, Any]]) -> str:
    return json.dumps({"files": dict(files)}, indent=1, sort_keys=True) + "\n"
