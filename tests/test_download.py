"""download.py against a server on this machine that is not always good."""

import contextlib
import errno
import hashlib
import http.server
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest

from jaxseg import download, misfit, pretrained
from jaxseg.download import cache_folder, fetch

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONTENT = np.random.default_rng(0).bytes(1_000_000)
NAME = f"network-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under every name.

    Attributes:
      requests: the Range header, or None, of each request.
      drop: after so many bytes of a body the connection is dropped; one number for each answer, None for the whole.
      ranges: whether Range is understood.
      length: whether Content-Length is sent.
      status: of every answer.
      gate: where an answer stops in the middle until the event is set.
      stop: the place in the content where it stops; None for the middle of what is asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.requests, self.drop = CONTENT, [], []
        self.ranges, self.length, self.status, self.gate, self.stop = True, True, 200, None, None
        self.url = f"http://127.0.0.1:{self.server_address[1]}/models/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        body = server.content[start:]
        if server.status != 200 or (start and not body):
            self.send_error(416 if server.status == 200 else server.status)
            return
        self.send_response(206 if start else 200)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        whole = server.drop.pop(0) if server.drop else None
        if server.gate is not None:
            half = len(body) // 2 if server.stop is None else server.stop - start
            self.wfile.write(body[:half])
            self.wfile.flush()
            server.gate.wait()
            body = body[half:]
        with contextlib.suppress(OSError):
            self.wfile.write(body[:whole])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        if server.gate is not None:
            server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """A proxy of the machine must not stand between the tests and their own server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def part(folder):
    return folder / f"{NAME}.part"


def refusal(*arguments, **options):
    """The one line with which a download fails; it names the file, the folder and the way out, and caches nothing."""
    with pytest.raises(ValueError) as error:
        fetch(*arguments, **options)
    message, (name, _, folder) = str(error.value), arguments
    assert "\n" not in message
    assert f"put {name} into {folder}" in message and "--weights PATH" in message
    assert not (folder / name).exists()
    return message


def test_a_good_file_is_downloaded_once(server, tmp_path):
    folder = tmp_path / "cache" / "jaxseg"
    for _ in range(2):
        path = fetch(NAME, server.url, folder)
        assert path == folder / NAME and path.read_bytes() == CONTENT
    assert server.requests == [None]
    assert not part(folder).exists()


def test_a_file_that_was_put_into_the_cache_is_found_and_nothing_written(tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    assert fetch(NAME, "http://127.0.0.1:9/", tmp_path) == tmp_path / NAME
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize(("status", "why"), [(404, "HTTP 404 Not Found"), (503, "HTTP 503")])
def test_a_refusal_of_the_server_is_told(server, tmp_path, status, why):
    server.status = status
    assert why in refusal(NAME, server.url, tmp_path)
    assert server.requests == [None]


@pytest.mark.parametrize("proxy", ["http://a..b:80", "http://[::1"])
def test_a_proxy_that_cannot_be_is_told(tmp_path, monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    refusal(NAME, "http://127.0.0.1:9/", tmp_path)


def test_a_length_that_is_none_is_told(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "send_header", lambda self, name, value: self.wfile.write(b""))
    monkeypatch.setattr(
        Handler, "end_headers", lambda self: self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: abc\r\n\r\n")
    )
    monkeypatch.setattr(Handler, "send_response", lambda *_: None)
    assert "no valid length" in refusal(NAME, server.url, tmp_path)


def test_another_files_content_is_refused_and_removed(server, tmp_path):
    server.content = CONTENT[:-1] + b"x"
    digest = hashlib.sha256(server.content).hexdigest()[:8]
    message = refusal(NAME, server.url, tmp_path)
    assert digest in message and NAME[8:16] in message
    assert not part(tmp_path).exists()
    server.content = CONTENT
    assert fetch(NAME, server.url, tmp_path).read_bytes() == CONTENT


def test_a_file_truncated_on_the_server_is_refused(server, tmp_path):
    server.content = CONTENT[:-1]
    assert "sha256" in refusal(NAME, server.url, tmp_path)
    assert not part(tmp_path).exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_is_resumed(server, tmp_path, ranges):
    server.drop, server.ranges = [400_000, 500_000 if not ranges else 100_000, None], ranges
    assert fetch(NAME, server.url, tmp_path).read_bytes() == CONTENT
    sizes = [None, 400_000, 500_000]
    assert server.requests == [size and f"bytes={size}-" for size in sizes]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_gets_no_further_is_given_up_and_what_came_is_kept(server, tmp_path, ranges):
    server.drop, server.ranges = [300_000, 0 if ranges else 300_000], ranges
    message = refusal(NAME, server.url, tmp_path)
    assert "(the connection broke): the 300000 bytes that came are kept, and the same command goes on" in message
    assert part(tmp_path).read_bytes() == CONTENT[:300_000]
    server.requests.clear()
    assert fetch(NAME, server.url, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=300000-"]


def test_where_nothing_came_nothing_is_said_to_be_kept(server, tmp_path):
    server.drop = [0]
    message = refusal(NAME, server.url, tmp_path)
    assert "(the connection broke): put " in message and "kept" not in message and "again" not in message


def test_what_is_kept_is_said_whatever_stands_in_the_way(server, tmp_path):
    part(tmp_path).write_bytes(CONTENT[:1234])
    server.status = 503
    assert "HTTP 503" in (message := refusal(NAME, server.url, tmp_path)) and "the 1234 bytes that came" in message


def test_without_a_length_the_digest_tells_a_dropped_connection(server, tmp_path):
    server.length, server.drop = False, [300_000]
    assert "sha256" in refusal(NAME, server.url, tmp_path)
    assert fetch(NAME, server.url, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more", b"something else", CONTENT[:-5] + b"other"])
def test_what_another_call_left_is_used_only_if_it_fits(server, tmp_path, left):
    part(tmp_path).write_bytes(left)
    assert fetch(NAME, server.url, tmp_path).read_bytes() == CONTENT
    assert server.requests[0] == f"bytes={len(left)}-"
    assert server.requests[1:] == ([] if left == CONTENT else [None])


def test_a_killed_download_leaves_no_file_and_is_resumed(server, tmp_path):
    server.gate = threading.Event()
    process = start_fetch(server.url, tmp_path)
    while download._size(part(tmp_path)) < download._CHUNK:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / NAME).exists()
    server.gate.set()
    size = download._size(part(tmp_path))
    assert 0 < size < len(CONTENT)
    assert fetch(NAME, server.url, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, f"bytes={size}-"]


def start_fetch(url, folder):
    code = "import pathlib, sys; from jaxseg.download import fetch; "
    code += "print(fetch(*sys.argv[1:3], pathlib.Path(sys.argv[3])))"
    return subprocess.Popen(
        [sys.executable, "-c", code, NAME, url, str(folder)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_of_two_processes_one_downloads_and_the_other_waits(server, tmp_path):
    pytest.importorskip("fcntl")
    server.gate = threading.Event()
    first = start_fetch(server.url, tmp_path)
    while not server.requests:
        assert first.poll() is None
        time.sleep(0.01)
    second = start_fetch(server.url, tmp_path)
    assert second.stdout.readline().startswith("waiting for another process")
    server.gate.set()
    for process in (first, second):
        out, error = process.communicate()
        assert process.returncode == 0, error
        assert out.strip() == str(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert server.requests == [None]


def test_where_the_first_of_two_processes_dies_the_other_goes_on_from_its_bytes(server, tmp_path):
    pytest.importorskip("fcntl")
    server.gate = threading.Event()
    first = start_fetch(server.url, tmp_path)
    while download._size(part(tmp_path)) < len(CONTENT) // 4:
        assert first.poll() is None
        time.sleep(0.01)
    second = start_fetch(server.url, tmp_path)
    assert second.stdout.readline().startswith("waiting for another process")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    size = download._size(part(tmp_path))
    server.gate.set()
    out, error = second.communicate(timeout=60)
    assert second.returncode == 0, error
    assert out.strip() == str(tmp_path / NAME) and (tmp_path / NAME).read_bytes() == CONTENT
    assert server.requests == [None, f"bytes={size}-"]


def test_no_network_is_told_at_once(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "refused" in refusal(NAME, f"http://127.0.0.1:{unused.getsockname()[1]}/", tmp_path)

    def offline(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    assert "name resolution" in refusal(NAME, "http://weights.invalid/", tmp_path)


def test_a_server_that_does_not_answer_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        message = refusal(NAME, f"http://127.0.0.1:{silent.getsockname()[1]}/", tmp_path, timeout=0.2)
    assert "timed out" in message or "no answer within 0.2 s" in message


def test_a_name_that_is_not_found_for_long_is_given_up(tmp_path, monkeypatch):
    """A look-up in a network that swallows packets takes a quarter of a minute, which no socket's timeout limits."""
    never = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: never.wait())
    assert "no answer within 0.2 s" in refusal(NAME, "http://weights.invalid/", tmp_path, timeout=0.2)
    never.set()


@pytest.mark.parametrize("sent", [1, 100_000, download._CHUNK - 1, download._CHUNK + 1, 700_001])
def test_a_body_that_stops_coming_is_given_up_and_every_byte_of_it_kept(server, tmp_path, sent):
    server.gate, server.stop = threading.Event(), sent
    message = refusal(NAME, server.url, tmp_path, timeout=0.5)
    assert f"the {sent} bytes that came are kept" in message
    assert part(tmp_path).read_bytes() == CONTENT[:sent]


def test_the_default_gives_up_within_seconds():
    assert 0 < download.TIMEOUT <= 10
    assert fetch.__defaults__[-1] == download.TIMEOUT


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_told_and_used(server, tmp_path, monkeypatch, capsys, code):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert fetch(NAME, server.url, tmp_path).read_bytes() == CONTENT
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and str(tmp_path) in out and "no lock" in out


def test_a_digest_may_be_given_and_is_then_asked_of_what_is_there_too(server, tmp_path):
    digest = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    server.drop = [300_000]  # and the rest is asked for
    path = fetch("archive.tgz", server.url, tmp_path, digest=digest)
    assert path.read_bytes() == CONTENT and server.requests == [None, "bytes=300000-"]
    assert fetch("archive.tgz", "http://127.0.0.1:9/", tmp_path, digest=digest) == path
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(
        ValueError, match=r"archive.tgz is damaged or another file: it has md5:\w{32}, not md5:\w{32}; rem"
    ):
        fetch("archive.tgz", server.url, tmp_path, digest=digest)
    server.content = b"something else"
    with pytest.raises(ValueError, match=r"what came has md5:.*: put other.tgz into .*, or leave it$"):
        fetch("other.tgz", server.url, tmp_path, digest=digest, remedy="leave it")
    assert not (tmp_path / "other.tgz").exists() and not (tmp_path / "other.tgz.part").exists()


def test_without_a_home_folder_the_way_out_is_told(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", home)
    with pytest.raises(ValueError, match=r"home directory.*XDG_CACHE_HOME.*--weights PATH"):
        pretrained.load_encoder("resnet18", "imagenet")


def test_a_cache_that_cannot_be_looked_into_is_told(tmp_path, monkeypatch):
    def is_file(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "is_file", is_file)
    assert_told = pytest.raises(ValueError, match="Permission denied")
    with assert_told as error:
        fetch(NAME, "http://127.0.0.1:1/", tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_cache_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "jaxseg"
    with pytest.raises(ValueError, match="Not a directory") as error:
        fetch(NAME, "http://127.0.0.1:1/", folder)
    assert str(folder) in str(error.value)


def test_the_bar_shows_what_was_there_and_what_came(server, tmp_path, monkeypatch):
    bars = []

    class Bar(download.tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False, "file": open(os.devnull, "w")})  # noqa: SIM115
            self.seen = []
            bars.append(self)

        def update(self, n=1):
            self.seen.append(n)
            super().update(n)

    monkeypatch.setattr(download, "tqdm", Bar)
    part(tmp_path).write_bytes(CONTENT[:600_000])
    fetch(NAME, server.url, tmp_path)
    bar = bars[0]
    assert bar.seen[0] == 600_000 and (bar.n, bar.total) == (len(CONTENT), len(CONTENT))


def test_the_cache_follows_the_xdg_rules(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "jaxseg"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / "home" / ".cache" / "jaxseg"


@pytest.mark.parametrize("variant", pretrained.VARIANTS)
def test_imagenet_is_torchvisions_file_in_the_cache(server, tmp_path, monkeypatch, variant):
    """The published digests are not those of our content: it is asked for under the right name, and refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = []
    opened = urllib.request.urlopen
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda request, **o: paths.append(request.full_url) or opened(request, **o)
    )
    with pytest.raises(ValueError) as error:
        pretrained.load_encoder(variant, "imagenet", base_url=server.url)
    names = {
        "resnet18": "resnet18-f37072fd.pth",
        "resnet34": "resnet34-b627a593.pth",
        "resnet50": "resnet50-0676ba61.pth",
        "resnet101": "resnet101-63fe2227.pth",
        "resnet152": "resnet152-394f9c45.pth",
    }
    assert paths == [server.url + names[variant]]
    assert f"put {names[variant]} into {tmp_path / 'jaxseg'}" in str(error.value)


def test_a_damaged_file_in_the_cache_is_named_with_the_remedy(shared, tmp_path, monkeypatch):
    """Somebody's copy, or a disk's fault: nothing else looks at a file that is there."""
    source = shared / "weights" / "resnet18-9f26ff83.pth"
    monkeypatch.setitem(pretrained.IMAGENET_FILES, "resnet18", source.name)
    cached = tmp_path / source.name
    content = bytearray(source.read_bytes())
    cached.write_bytes(content)
    assert "params" in pretrained.load_encoder("resnet18", "imagenet", base_url="http://127.0.0.1:9/", cache=tmp_path)
    for damaged in (content[: len(content) // 2], content[:20_000_000] + b"x" + content[20_000_001:], b""):
        cached.write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            pretrained.load_encoder("resnet18", "imagenet", base_url="http://127.0.0.1:9/", cache=tmp_path)
        message = str(error.value)
        assert str(cached) in message and "download it again" in message and "\n" not in message


def test_imagenet_is_loaded_from_the_file_that_came(server, tmp_path, monkeypatch):
    variables = pretrained.convert_resnet(
        {
            name: np.full(shape, 0.5, np.float32)
            for name, shape in (
                (misfit.torch_name(path), misfit.torch_shape(shape))
                for path, shape in pretrained.encoder_shapes("resnet18").items()
            )
        },
        "resnet18",
    )
    pretrained.save_torch(variables, tmp_path / "a.safetensors")
    server.content = (tmp_path / "a.safetensors").read_bytes()
    name = f"resnet18-{hashlib.sha256(server.content).hexdigest()[:8]}.safetensors"
    monkeypatch.setitem(pretrained.IMAGENET_FILES, "resnet18", name)
    got = pretrained.load_encoder("resnet18", "imagenet", base_url=server.url, cache=tmp_path / "cache")
    assert (got["params"]["layer4_1"]["conv2"]["kernel"] == 0.5).all()
    assert (tmp_path / "cache" / name).is_file()
