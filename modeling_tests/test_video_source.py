"""Where bytes come from: data URIs as people write them, downloads as servers answer them, errors without payloads."""

import base64
import urllib.parse
from types import SimpleNamespace

import pytest

from loopback import Handler, served_by
from transformers_crosslmm.video_source import VideoLimits, VideoOpenError, open_source

DATA = bytes(range(256)) * 3 + b"?"  # its base64 has +, / and padding
BASE64 = base64.b64encode(DATA).decode()
HERE = VideoLimits(allow_private_addresses=True)


def read(source, limits=HERE) -> bytes:
    with open_source(source, limits) as file:
        return file.read()


@pytest.fixture(scope="module")
def server():
    """Answers with `DATA`: as a part of a file below /part/, as the target of a proxy for other hosts."""
    requests = []

    class Giving(Handler):
        def do_GET(self):
            requests.append((self.path, self.headers.get("User-Agent")))
            if self.path.startswith("/part/"):
                part = "bytes " + self.path.removeprefix("/part/")
                self.answer(DATA, status=206, headers={"Content-Range": part})
            else:
                self.answer(DATA)

    with served_by(Giving) as url:
        yield SimpleNamespace(requests=requests, url=url)


@pytest.mark.parametrize(
    "uri",
    [
        "data:video/mp4;base64," + BASE64,
        "data:video/mp4;base64," + BASE64.rstrip("="),
        "data:video/mp4;base64," + "\r\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
        "data:video/mp4;base64," + urllib.parse.quote(BASE64, safe=""),
        "DATA:VIDEO/MP4;BASE64," + BASE64,
        "data:video/mp4;codecs=avc1;base64," + BASE64,
        "data:;base64," + BASE64,
        "data:application/octet-stream," + urllib.parse.quote_from_bytes(DATA),
    ],
    ids=["plain", "no padding", "line breaks", "percent-encoded", "upper case", "parameters", "no type", "no base64"],
)
def test_a_data_uri_is_read_in_every_way_it_is_written(uri):
    assert read(uri) == DATA


def test_a_list_of_jpegs_in_one_uri_is_refused_saying_what_it_is():
    with pytest.raises(VideoOpenError, match=r"list of JPEG pictures and not a file\. Pass a list of frames"):
        read(f"data:video/jpeg;base64,{BASE64},{BASE64}")


@pytest.mark.parametrize(
    "source",
    [
        "data:video/mp4;base64," + "!" * 60_000,
        "data:video/jpeg;base64," + "A" * 60_000,
        "A" * 60_000,
        "ftp" + "A" * 60_000 + "://x",
        "file://" + "a" * 60_000 + "/x.mp4",
        "http://127.0.0.1:1/" + "A" * 60_000,
    ],
    ids=lambda source: source[:24],
)
def test_an_error_does_not_carry_the_payload(source):
    with pytest.raises(VideoOpenError) as error:
        read(source)
    assert len(str(error.value)) < 400


def test_a_download_says_who_asks(server):
    assert read(f"{server.url}/clip.mp4") == DATA
    assert server.requests[-1] == ("/clip.mp4", "transformers_crosslmm")


def test_a_part_is_taken_where_it_is_the_whole(server):
    assert read(f"{server.url}/part/0-{len(DATA) - 1}/{len(DATA)}") == DATA
    for part in (f"0-{len(DATA) - 1}/{len(DATA) + 1}", f"1-{len(DATA) - 1}/{len(DATA)}"):
        with pytest.raises(VideoOpenError, match="only a part of the file"):
            read(f"{server.url}/part/{part}")


def test_a_proxy_is_used_only_if_asked_for(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    url = "http://127.0.0.1:1/a.mp4?part=1"
    with pytest.raises(VideoOpenError, match=r"Cannot connect to"):
        read(url)
    assert read(url, VideoLimits(use_proxy=True)) == DATA
    assert server.requests[-1][0] == url
