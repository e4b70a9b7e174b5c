"""Downloads, from a server on this machine: resumed, checked, from mirrors, one process at a time."""

from __future__ import annotations

import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data import archives, download, images, tiny_imagenet
from data.download import fetch
from tests.datafiles import error, md5, pixels, publish_cifar, publish_svhn, publish_tiny, write_files

CONTENT = pixels(1, 10_000).tobytes()
SUM = md5(CONTENT)
KMNIST = archives.idx("KMNIST")


class Site(ThreadingHTTPServer):
    """A server whose faults a test sets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True  # whether it understands a request for a part
        self.breaks: list[int] = []  # so many bytes, then the connection ends, per answer
        self.codes: list[int] = []  # answered in place of the file
        self.stalls = 0  # so many answers stop after their headers
        self.asked: list[tuple[str, str | None]] = []  # path and Range
        self.ended = threading.Event()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site, part = self.server, self.headers["Range"]
        site.asked.append((self.path, part))
        content = site.files.get(self.path)
        if content is None or site.codes:
            return self.send_error(site.codes.pop(0) if site.codes else 404)
        start = 0
        if site.ranges and part:
            start = int(part.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if site.stalls:
            site.stalls -= 1
            site.ended.wait(30)
            return None
        self.wfile.write(content[start:][: site.breaks.pop(0) if site.breaks else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0)
    with Site() as server:
        server.files["/file"] = CONTENT
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def path(raw):
    return raw / "new" / "file"


def get(site, path, *urls) -> None:
    fetch("cifar10", urls or [f"{site.base}/file"], path, SUM)
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]


def test_whole(site, path):
    get(site, path)
    get(site, path)  # it is there: nothing is asked
    assert site.asked == [("/file", None)]
    path.write_bytes(b"another")  # replaced
    get(site, path)
    assert len(site.asked) == 2


def test_connection_that_dies_is_resumed(site, path):
    site.breaks = [3000, 2500]
    get(site, path)
    assert site.asked == [("/file", None), ("/file", "bytes=3000-"), ("/file", "bytes=5500-")]


def test_server_without_ranges_starts_over(site, path):
    site.ranges, site.breaks = False, [3000]
    get(site, path)
    assert site.asked == [("/file", None), ("/file", "bytes=3000-")]


def test_what_an_earlier_process_left_is_resumed(site, path):
    write_files(path.parent, {"file.part": CONTENT[:7000]})
    get(site, path)
    assert site.asked == [("/file", "bytes=7000-")]


@pytest.mark.parametrize("left", [b"x" * 500, b"x" * 20_000], ids=["shorter", "longer"])
def test_leftover_of_another_file_is_dropped(site, path, left):
    write_files(path.parent, {"file.part": left})
    get(site, path)
    assert site.asked == [("/file", f"bytes={len(left)}-"), ("/file", None)]


def test_leftover_that_is_whole(site, path):
    write_files(path.parent, {"file.part": CONTENT})
    get(site, path)
    assert site.asked == [("/file", "bytes=10000-")]


def test_giving_up_keeps_the_part(site, path):
    site.breaks = [100] * download.ATTEMPTS
    count = 100 * download.ATTEMPTS
    assert error(lambda: get(site, path)) == (
        f"cifar10: fetching file failed ({site.base}/file: the connection ended after {count} of 10,000 bytes): "
        f"try again, or place file (md5 {SUM}) in {path.parent} by hand"
    )
    assert (path.parent / "file.part").read_bytes() == CONTENT[:count] and not path.exists()
    get(site, path)


def test_wrong_content(site, path):
    site.files["/wrong"] = b"<html>"
    assert f"({site.base}/wrong: its md5 is {md5(b'<html>')}, wanted {SUM})" in error(lambda: get(site, path, f"{site.base}/wrong"))
    assert site.asked == [("/wrong", None)] and not list(path.parent.iterdir())
    get(site, path, f"{site.base}/wrong", f"{site.base}/file")


def test_answers_of_the_server(site, path):
    text = error(lambda: get(site, path, f"{site.base}/nothing", "http://127.0.0.1:9/file", "nonsense"))
    assert f"{site.base}/nothing: HTTP Error 404: Not Found; http://127.0.0.1:9/file: <urlopen error" in text and "; nonsense: " in text
    assert site.asked == [("/nothing", None)]  # once: it will not be there the next time either
    site.codes = [503, 429]
    get(site, path)
    assert len(site.asked) == 4


def test_stalled_server(site, path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    site.stalls = 1
    begun = time.monotonic()
    get(site, path)
    assert len(site.asked) == 2 and time.monotonic() - begun < 10


def test_folder_that_cannot_be_made(site, raw):
    (raw / "new").write_text("")
    assert "File exists" in error(lambda: get(site, raw / "new" / "file"))


# The data sets.


def test_mirrors_come_before_the_official_url(site, raw, monkeypatch):
    _, whole = publish_cifar(monkeypatch, "cifar10")
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{site.base}/official/cifar-10-python.tar.gz")
    site.files["/b/cifar-10-python.tar.gz"] = whole
    site.files["/official/cifar-10-python.tar.gz"] = whole
    bundle = images.cifar10(str(raw), "cpu", download=[f"{site.base}/a", f"{site.base}/b/", f"{site.base}/c"])
    assert [name for name, _ in site.asked] == ["/a/cifar-10-python.tar.gz", "/b/cifar-10-python.tar.gz"]
    assert len(bundle.splits["train"][1]) == 20
    images.cifar10(str(raw), "cpu", download=True)
    assert len(site.asked) == 2  # it is there
    images.cifar10(str(raw / "another"), "cpu", download=True)
    assert site.asked[2:] == [("/official/cifar-10-python.tar.gz", None)]


@pytest.mark.parametrize("there", ["truncated", "broken folder"])
def test_download_replaces_what_is_not_whole(site, raw, monkeypatch, there):
    files, whole = publish_cifar(monkeypatch, "cifar100")
    site.files["/cifar-100-python.tar.gz"] = whole
    left = {"cifar-100-python.tar.gz": whole[:100]} if there == "truncated" else files | {"cifar-100-python/train": b"junk"}
    write_files(raw, left)
    assert len(images.cifar100(str(raw), "cpu", download=[site.base]).splits["train"][1]) == 20
    assert (raw / "cifar-100-python.tar.gz").read_bytes() == whole


def test_only_the_missing_file_is_fetched(site, raw, monkeypatch):
    files, _ = publish_svhn(monkeypatch)
    for file, content in files.items():
        site.files[f"/{file.removeprefix('svhn/')}"] = content
    write_files(raw, {"svhn/train_32x32.mat": files["svhn/train_32x32.mat"]})
    assert len(images.svhn(str(raw), "cpu", download=[site.base]).splits["test"][1]) == 10
    assert site.asked == [("/test_32x32.mat", None)]


def test_tiny_imagenet(site, raw, monkeypatch):
    site.files["/tiny-imagenet-200.zip"] = publish_tiny(monkeypatch)[1]
    monkeypatch.setattr(tiny_imagenet, "URL", f"{site.base}/tiny-imagenet-200.zip")
    assert len(images.tiny_imagenet(str(raw), "cpu", download=True).splits["train"][1]) == 9


def test_failure_names_the_file_and_the_way_by_hand(site, raw, monkeypatch):
    _, whole = publish_cifar(monkeypatch, "cifar10")
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{site.base}/cifar-10-python.tar.gz")
    assert error(lambda: images.cifar10(str(raw), "cpu", download=True)) == (
        f"cifar10: fetching cifar-10-python.tar.gz failed ({site.base}/cifar-10-python.tar.gz: HTTP Error 404: Not Found): "
        f"try again, or place cifar-10-python.tar.gz (md5 {md5(whole)}) in {raw} by hand"
    )


def test_nothing_is_downloaded_into_a_folder_marked_read_only(site, raw):
    raw.chmod(0o555)  # which root could write all the same
    try:
        text = error(lambda: images.stl10(str(raw), "cpu", download=[site.base]))
        assert text == f"stl10: nothing can be downloaded into {raw}, which is read-only: point DATA_DIR at another folder"
        assert not site.asked and not list(raw.iterdir())
    finally:
        raw.chmod(0o755)
