"""URLs of S3 stores: what they say, and what they must not hold."""

from __future__ import annotations

import pytest

from silo.errors import InvalidRequestError
from silo.sync.s3_location import EtagForm, S3Client, S3Credentials, S3Location, parse_s3_url


def test_plain() -> None:
    assert parse_s3_url("s3://bucket") == S3Location("bucket")
    assert parse_s3_url("s3://bucket/") == S3Location("bucket")
    assert parse_s3_url("s3://bucket/a/b/").object_name("c") == "a/b/c"
    assert parse_s3_url("s3://bucket").object_name("c") == "c"


def test_every_option() -> None:
    location = parse_s3_url(
        "s3://bucket/pre/fix?endpoint=https://s3.example:9000/&region=eu-1&path-style=false&payload=unsigned"
        "&ca_file=/etc/ca.pem&timeout_s=5&client=aiobotocore&profile=work"
    )
    assert location == S3Location(
        bucket="bucket",
        prefix="pre/fix",
        endpoint="https://s3.example:9000",
        region="eu-1",
        path_style=False,
        signed_payload=False,
        ca_file="/etc/ca.pem",
        timeout_s=5.0,
        client=S3Client.AIOBOTOCORE,
        profile="work",
    )


def test_path_style_follows_the_endpoint() -> None:
    assert not parse_s3_url("s3://bucket").path_style
    assert parse_s3_url("s3://bucket?endpoint=http://localhost:9000").path_style
    assert parse_s3_url("s3://bucket?path_style=true").path_style


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/a/b",
        "s3://bucket?endpoint=http://127.0.0.1:9000&region=us-east-1",
        "s3://bucket/x?endpoint=http://127.0.0.1:9000&path_style=false&payload=unsigned&timeout_s=2.5",
        "s3://bucket?path_style=true&client=aiobotocore&profile=work",
    ],
)
def test_urls_come_back(url: str) -> None:
    assert parse_s3_url(url).url == url
    assert parse_s3_url(parse_s3_url(url).url) == parse_s3_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://bucket",
        "s3:bucket",
        "s3://",
        "s3://b",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket#fragment",
        "s3://bucket?nonsense=1",
        "s3://bucket?region=a&region=b",
        "s3://bucket?path_style=maybe",
        "s3://bucket?payload=none",
        "s3://bucket?client=boto",
        "s3://bucket?profile=work",
        "s3://bucket?timeout_s=0",
        "s3://bucket?timeout_s=soon",
        "s3://bucket?timeout_s=86400",
        "s3://bucket?endpoint=ftp://host",
        "s3://bucket?endpoint=host:9000",
        "s3://bucket?endpoint=http://host?x=1",
    ],
)
def test_nonsense(url: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_s3_url(url)


@pytest.mark.parametrize(
    "url", ["s3://AKIA:topsecret@bucket/x", "s3://bucket?endpoint=http://user:topsecret@host:9000"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_s3_url(url)
    assert "topsecret" not in str(caught.value)


def test_secrets_do_not_show() -> None:
    shown = repr(S3Credentials("AKIA", "topsecret", "sessionsecret"))
    assert "secret" not in shown


def test_time_grows_with_size() -> None:
    location = parse_s3_url("s3://bucket?timeout_s=10")
    assert location.time_for(0) == 10
    assert location.time_for(32 << 20) == 10 + 128


def test_etag_forms() -> None:
    assert EtagForm.QUOTED.write("abc") == '"abc"'
    assert EtagForm.UNQUOTED.write("abc") == "abc"
