import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from lerobot_sets import LENGTHS, made_up, numbers, write

from vla import InputError
from vla.data.lerobot import LeRobotDataset
from vla.hub import dataset, dataset_name

NOBODY = "http://127.0.0.1:9"  # an address where no one answers
# Downloads the data sets it is given, and prints the folder or what was wrong, a line for each.
DOWNLOAD = """
import json, sys
from vla import InputError
from vla.hub import dataset
for path in sys.argv[1:]:
    try:
        print(json.dumps({"folder": str(dataset(path))}))
    except InputError as error:
        print(json.dumps({"error": str(error)}))
"""


class Hub(ThreadingHTTPServer):
    """Plays the part of the Hugging Face hub that downloads a data set, me/cubes, of two revisions."""

    def __init__(self, revisions):
        super().__init__(("127.0.0.1", 0), _Answer)
        # Commits are named by their content, as git does.
        self.commits = {name: hashlib.sha1(str(root).encode()).hexdigest() for name, root in revisions.items()}
        self.roots = {self.commits[name]: root for name, root in revisions.items()}
        self.asked = []  # method and path of each request
        self.failing = "nothing"  # requests that end so are not answered: in an error, or for all of them not at all

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files_sent(self):
        return [path for method, path in self.asked if method == "GET" and "/resolve/" in path]


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(with_content=True)

    def do_HEAD(self):
        self.answer(with_content=False)

    def answer(self, with_content):
        path, hub = unquote(urlparse(self.path).path), self.server
        hub.asked.append((self.command, path))
        if not hub.failing:
            return self.connection.close()
        parts = path.strip("/").split("/")
        if parts[:4] == ["api", "datasets", "me", "cubes"] and parts[4] == "revision":
            if parts[5] not in hub.commits:
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self.send_json({"id": "me/cubes", "sha": hub.commits[parts[5]], "siblings": [], "tags": []})
        if parts[:4] == ["api", "datasets", "me", "cubes"] and parts[4] == "tree":
            root = hub.roots[parts[5]]
            files = [file for file in sorted(root.rglob("*")) if file.is_file()]
            return self.send_json(
                [
                    {
                        "type": "file",
                        "path": str(file.relative_to(root)),
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                    }
                    for file in files
                ]
            )
        if parts[:4] == ["datasets", "me", "cubes", "resolve"]:
            content = (hub.roots[parts[4]] / "/".join(parts[5:])).read_bytes()
            headers = {"X-Repo-Commit": parts[4], "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            if with_content and path.endswith(hub.failing):
                return self.send(500, b"", {})
            return self.send(200, content if with_content else b"", headers, len(content))
        return self.send(401, b"", {"X-Error-Message": "Invalid username or password."})

    def send_json(self, content):
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status, content, headers, length=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    revisions = {
        "main": write(tmp_path / "main", codec="h264"),
        "v3.0": write(tmp_path / "v3", made_up(LENGTHS[:2])),
    }
    server = Hub(revisions)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def download(tmp_path):
    """download(path, …, address) -> what DOWNLOAD prints, with an empty cache of its own for each test."""

    def run(*paths, address, **environment):
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*", **environment}
        own["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        command = [sys.executable, "-c", DOWNLOAD, *paths]
        process = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in process.stderr, process.stderr
        return [json.loads(line) for line in process.stdout.splitlines()]

    return run


FRAMES = np.arange(sum(LENGTHS))


def test_data_set_is_downloaded_once_and_opened_like_a_folder(hub, download):
    first, again = download("me/cubes", "me/cubes", address=hub.address)
    data = LeRobotDataset(first["folder"])
    np.testing.assert_array_equal(numbers(data.images(FRAMES)), np.stack([FRAMES, 100 + FRAMES], axis=1))
    sent = hub.files_sent()
    assert len(sent) == len(set(sent)) == sum(file.is_file() for file in hub.roots[hub.commits["main"]].rglob("*"))
    assert again == first
    hub.asked.clear()
    assert download("me/cubes", address=hub.address) == [first]  # with what opening it has left in the folder
    assert hub.asked
    assert hub.files_sent() == []


def test_data_set_that_was_downloaded_opens_without_a_network(hub, download):
    [first] = download("me/cubes", address=hub.address)
    assert download("me/cubes", address=NOBODY) == [first]
    assert download("me/cubes", address=hub.address, HF_HUB_OFFLINE="1") == [first]


def test_revision_is_downloaded_beside_another(hub, download):
    main, tagged = download("me/cubes", "me/cubes@v3.0", address=hub.address)
    assert LeRobotDataset(main["folder"]).num_frames == sum(LENGTHS)
    assert LeRobotDataset(tagged["folder"]).num_frames == sum(LENGTHS[:2])
    assert download("me/cubes@v3.0", address=NOBODY) == [tagged]


def test_download_that_broke_off_goes_on_with_what_is_missing(hub, download):
    hub.failing = "meta/tasks.parquet"
    [broken] = download("me/cubes", address=hub.address)
    assert "me/cubes is no folder here, and could not be downloaded" in broken["error"]
    assert "500" in broken["error"]
    sent, hub.failing = hub.files_sent(), "nothing"
    [whole] = download("me/cubes", address=hub.address)
    assert LeRobotDataset(whole["folder"]).num_episodes == len(LENGTHS)
    again = hub.files_sent()[len(sent) :]
    assert any(path.endswith("meta/tasks.parquet") for path in again)
    assert not set(again) & {path for path in sent if not path.endswith("meta/tasks.parquet")}


def test_what_cannot_be_downloaded_is_refused_at_once_with_the_reason(hub, download):
    def told(*paths, address=hub.address, **environment):
        began = time.monotonic()
        lines = download(*paths, address=address, **environment)
        assert time.monotonic() - began < 20
        for path, line in zip(paths, lines, strict=True):
            assert line["error"].startswith(f"{path} is no folder here, and could not be downloaded from the Hugging")
            assert line["error"].endswith(": check --data.path, or the network, or log in if it is private")
        return [line["error"] for line in lines]

    unknown, no_revision = told("data/typo", "me/cubes@nowhere")
    assert "401" in unknown
    assert "404" in no_revision
    assert "refused" in told("me/cubes", address=NOBODY)[0]
    assert "HF_HUB_OFFLINE" in told("me/cubes", HF_HUB_OFFLINE="1")[0]
    hub.failing = ""  # every connection
    assert "disconnected" in told("me/cubes")[0]


@pytest.mark.parametrize("path", ["typo", "./typo", "../typo", "/nowhere/typo", "data/sets/typo", "data/"])
def test_path_that_can_only_be_a_folder_is_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dataset(path) == Path(path)
    with pytest.raises(InputError, match=r"meta/info.json cannot be read .*No such file.*: check --data.path"):
        LeRobotDataset(path)


def test_missing_folder_of_two_names_is_refused_as_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^data/typo is no folder here, and could not be downloaded .*--data.path"):
        LeRobotDataset("data/typo")


def test_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("me/cubes"))
    assert LeRobotDataset("me/cubes").num_frames == sum(LENGTHS)


@pytest.mark.parametrize(
    ("path", "name"),
    [("me/cubes", "cubes"), ("me/cubes@v3.0", "cubes"), ("me/cubes@refs/pr/1", "cubes"), ("data/mine/", "mine")],
)
def test_data_set_is_called_by_its_last_name_without_the_revision(path, name):
    assert dataset_name(path) == name


def test_folder_keeps_an_at_in_its_name(tmp_path, monkeypatch):
    (tmp_path / "mine@home").mkdir()
    monkeypatch.chdir(tmp_path / "mine@home")
    assert dataset_name(".") == dataset_name(tmp_path / "mine@home") == "mine@home"
