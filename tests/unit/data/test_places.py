"""Shards may lie at http://, https://, s3:// and gs:// URLs and nowhere else, and what will not do is told before a server is asked."""

import pytest

from softmoe_train.data.places import ShardsError, check_places, expand_shards, is_url

pytest.importorskip("aiohttp")


class Shelf:
    """A listing that says what it was asked."""

    def tars(self, place: str) -> list[str]:
        return [f"{place}/x.tar"]


def test_a_brace_pattern_names_urls_and_a_folder_or_a_glob_is_left_to_the_listing() -> None:
    spec = ["https://h:80/a/t-{00..02}.tar", "http://[::1]:8000/one.tar", "https://h/folder/"]
    assert expand_shards(spec, key="data.train", listing=Shelf()) == [
        "https://h:80/a/t-00.tar", "https://h:80/a/t-01.tar", "https://h:80/a/t-02.tar", "http://[::1]:8000/one.tar",
        "https://h/folder//x.tar",
    ]  # fmt: skip
    check_places(spec, key="data.train")
    assert [is_url(one) for one in (*spec, "a/b.tar", "http.tar")] == [True, True, True, False, False]
    with pytest.raises(ShardsError, match="which only training lists"):
        expand_shards("https://h/folder/", key="data.train")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("simplecache::https://h/a.tar", "nor an http://, https://, s3:// or gs:// URL"),
        ("https://h/a.tar::file:///etc/x.tar", "it is no URL of one store"),
        ("https://h/{a,b::c}.tar", "it is no URL of one store"),
        ("https://h/{a,b:}{:c,d}.tar", "a brace pattern may stand in the path alone"),
        ("pipe:cat /etc/passwd", "nor an http://"),
        ("pipe://cat", "nor an http://"),
        ("ftp://h/a.tar", "shards are read from these alone"),
        ("file:///data/a.tar", "nor an http://"),
        ("local:///data/a.tar", "nor an http://"),
        ("memory://a/a.tar", "nor an http://"),
        ("HTTPS://h/a.tar", "nor an http://"),
        ("https:/h/a.tar", "nor an http://"),
        ("{https,file}://h/a.tar", "cannot be found"),
        (
            "https://user:secret@h/a.tar",
            r"data\.train=https://h/a\.tar: a URL here has no user, key or query; .* environment",
        ),
        ("https://h/a.tar?X-Amz-Signature=secret", "a URL here has no user, key or query"),
        ("https://h/a.tar#secret", "a URL here has no user, key or query"),
        ("https://h/{a,b}.tar?secret", "a URL here has no user, key or query"),
        ("https://h/../a.tar", r"no \.\."),
        (
            "https://h/t-*.tar",
            r"lists no files, so nothing can match \*; name them by a brace pattern, or publish an index\.json",
        ),
        ("https://h/t-[01].tar", r"no \[ \]"),
        ("https://{a,b}/t.tar", "it names no host"),
        ("https:///a.tar", "it names no host"),
        ("https://h/{0..2.tar", "is not a brace pattern"),
        ("https://h/a\nb.tar", "a character that cannot be seen"),
        (["https://h/a.tar", "https://h/{a,b}.tar"], "twice"),
    ],
)
def test_what_is_no_place_for_shards_is_refused_in_one_message(spec: str | list[str], words: str) -> None:
    def told(call) -> str:
        with pytest.raises(ShardsError, match=words) as caught:
            call()
        return str(caught.value)

    message = told(lambda: expand_shards(spec, key="data.train", listing=Shelf()))
    assert message.startswith("data.train=")
    assert "secret" not in message
    if isinstance(spec, str):
        assert told(lambda: check_places(spec, key="data.train"))


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", absent)
    for spec in ("s3://bucket/folder", "s3://bucket/t-*.tar"):
        with pytest.raises(ShardsError, match="s3:// has no driver here: Please install s3fs"):
            check_places(spec, key="data.train")


def test_no_environment_variable_makes_another_url_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOPEN_REWRITE", "WDS_REWRITE"):
        monkeypatch.setenv(name, "https://h=pipe:touch /tmp/ran #")
    assert expand_shards("https://h/a.tar", key="data.train") == ["https://h/a.tar"]
