import pytest

from softmoe_train.redact import REDACTED, without_secrets


@pytest.mark.parametrize(
    "key", ["token", "hf_token", "api_key", "apikey", "aws_secret_access_key", "password", "PASSWORD"]
)
def test_a_value_under_a_secret_sounding_key_is_left_out(key: str) -> None:
    assert without_secrets({"data": [{key: "hunter2"}]}) == {"data": [{key: REDACTED}]}


@pytest.mark.parametrize("key", ["tokens", "num_tokens", "token_choice", "slots_per_expert", "monkey", "secretary"])
def test_a_key_that_only_resembles_a_secret_is_kept(key: str) -> None:
    assert without_secrets({key: 196}) == {key: 196}


def test_an_absent_secret_stays_absent() -> None:
    assert without_secrets({"token": None}) == {"token": None}


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://h.org/a-{000..009}.tar?X-Amz-Signature=abc&b=c", f"https://h.org/a-{{000..009}}.tar?{REDACTED}"),
        ("https://me:pass@h.org/a.tar", "https://h.org/a.tar"),
        ("s3://bucket/a@b/x.tar", "s3://bucket/a@b/x.tar"),
        ("https://h.org/a.tar", "https://h.org/a.tar"),
        ("a?b://", "a?b://"),
        ("/data/a-{0..3}.tar", "/data/a-{0..3}.tar"),
    ],
)
def test_users_and_signatures_of_urls_are_left_out(url: str, kept: str) -> None:
    assert without_secrets({"data": {"train": [url]}}) == {"data": {"train": [kept]}}
