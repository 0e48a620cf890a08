"""The configuration: file and flags say the same, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from silo.config import ServeConfig, VolumeConfig, load_config, merge_flags, parse_volume_flag
from silo.errors import InvalidRequestError

FULL = """
state = "/tmp/state"
store = "file:///tmp/store"
peer = "tcp:0.0.0.0:5170"
insecure_peer = true
metrics = "tcp:127.0.0.1:9090"
listen = "unix:/run/silo/{group}.sock"

[sync]
interval = "2s"
bandwidth = "100Mbit"
throttle = true

[migration]
workload_timeout = "90s"
connections = 4
hot = "64M"

[incoming]
directory = "/srv"

[nbd]
certificate = "cert.pem"
key = "key.pem"
connections = 16
memory = "64M"

[groups.vm1]
flush = "store"
listen = ["unix:/run/vm1.sock", "tcp:127.0.0.1:10809"]

[groups.vm1.volumes.disk]
path = "disk.img"
size = "8G"
chunk_size = "128K"

[workload]
suspend = "true"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "silo.toml"
    path.write_text(text)
    return path


def test_a_full_file_is_understood(tmp_path: Path) -> None:
    """Every value arrives in bytes, seconds and bytes per second."""
    config = load_config(write(tmp_path, FULL))
    disk = config.groups["vm1"].volumes["disk"]
    assert (disk.size_bytes, disk.chunk_bytes) == (8 << 30, 128 << 10)
    assert (config.sync.interval_s, config.sync.bandwidth_bps) == (2.0, 12.5e6)
    assert config.listen_urls("vm1") == ["unix:/run/vm1.sock", "tcp:127.0.0.1:10809"]
    assert config.listen_urls("other") == ["unix:/run/silo/other.sock"]
    assert config.workload.commands == {"suspend": "true"}
    assert config.migration.workload_timeout_s == 90.0
    assert (config.sync.throttle, config.metrics) == (True, "tcp:127.0.0.1:9090")
    assert (config.flush_of("vm1"), config.flush_of("other")) == ("store", "local")
    assert config.migration.connections == 4
    assert config.migration.hot_bytes == 64 << 20
    limits = config.nbd.settings()
    assert (limits.connections_max, limits.payload_bytes, limits.handshake_timeout_s) == (16, 64 << 20, 30.0)


def test_flags_make_the_same_config_as_the_file(tmp_path: Path) -> None:
    """A file and the flags that say the same end in equal values."""
    text = """
    state = "/s"
    store = "file:///t"
    [sync]
    interval = "2s"
    [groups.vm1]
    listen = ["unix:/n"]
    [groups.vm1.volumes.disk]
    path = "d"
    size = "1G"
    """
    flags = merge_flags(
        ServeConfig(),
        group="vm1",
        volumes=["disk=d,size=1G"],
        listen=["unix:/n"],
        sync_interval="2s",
        state="/s",
        store="file:///t",
    )
    assert load_config(write(tmp_path, text)) == flags


def test_a_flag_beats_the_file(tmp_path: Path) -> None:
    """What is given on the command line replaces what the file says, and nothing else."""
    config = merge_flags(load_config(write(tmp_path, FULL)), group="vm1", store="file:///other")
    assert config.store == "file:///other"
    assert config.state == "/tmp/state"
    assert config.groups["vm1"].volumes["disk"].path == "disk.img"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sotre = 'x'", "sotre"),
        ("[sync]\ninterval = '5 parsecs'", "parsecs"),
        ("[sync]\ninterval = 0", "positive"),
        ("[migration]\nworkload_timeout = 0", "positive"),
        ("flush = 'peer'", "flush"),
        ("flush = 'store'", "needs a store"),
        ("[groups.vm1]\nflush = 'store'\n[groups.vm1.volumes.disk]\npath = 'd'", "needs a store"),
        ("[migration]\nconnections = 17", "connections"),
        ("[groups.vm1.volumes.disk]\npath = 'd'\nsize = '8 bananas'", "bananas"),
        ("[groups.vm1.volumes.disk]\npath = 'd'\nchunk_size = '5K'", "5K"),
        ("[groups.vm1.volumes.disk]\nsize = '8G'", "path"),
        ("[groups.vm1]\nvolumes = {}", "at least one volume"),
        ("[groups.'../x'.volumes.disk]\npath = 'd'", "../x"),
        ("listen = 'udp:1'", "udp:1"),
        ("peer = 'tcp:0.0.0.0:5170'", "insecure_peer"),
        ("peer = 'tcp:0.0.0.0:99999'", "99999"),
        ("insecure_peer = 'yes'", "insecure_peer"),
        ("state = ", "TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, expected: str) -> None:
    """The error names the file and what is wrong in it."""
    path = write(tmp_path, text)
    with pytest.raises(InvalidRequestError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Not a traceback."""
    with pytest.raises(InvalidRequestError, match="nowhere"):
        load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("text", ["disk", "=x", "disk=", "disk=d,sizes=8G", "disk=d,size"])
def test_a_volume_flag_that_makes_no_sense_is_shown(text: str) -> None:
    """With the text, so that it can be found in a long command line."""
    with pytest.raises(InvalidRequestError) as caught:
        name, volume = parse_volume_flag(text)
        merge_flags(ServeConfig(), group="g", volumes=[text])
        pytest.fail(f"{name}={volume} was accepted")
    assert caught.value.hint


def test_a_volume_needs_a_group() -> None:
    """--volume alone says which group it lacks."""
    with pytest.raises(InvalidRequestError, match="--group"):
        merge_flags(ServeConfig(), volumes=["disk=d"])


def test_bases_of_an_overlay_are_listed_nearest_first() -> None:
    """In flags and in files alike; a plain disk has none."""
    _, disk = parse_volume_flag("disk=d.overlay,base=patched.overlay,base=golden.img")
    assert disk.bases == ["patched.overlay", "golden.img"]
    assert parse_volume_flag("disk=d.img")[1].bases == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("certificate = 'x'", "needs its key"),
        ("client_ca = 'x'", "without TLS"),
        ("connections = 0", "connections"),
        ("memory = '4K'", "too little"),
        ("handshake_timeout = '0s'", "positive"),
        ("tls = 'never'", "tls"),
        ("client_certificates = 'some'", "client_certificates"),
    ],
)
def test_what_makes_no_sense_for_nbd_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    """With the place in the file."""
    with pytest.raises(InvalidRequestError, match=expected) as raised:
        load_config(write(tmp_path, f"[nbd]\n{text}\n"))
    assert "nbd" in str(raised.value)


def test_flags_for_nbd_beat_the_file(tmp_path: Path) -> None:
    """Each of them alone; what makes no sense together is found."""
    config = load_config(write(tmp_path, FULL))
    merged = merge_flags(config, nbd={"certificate": "other.pem", "key": None})
    assert (merged.nbd.certificate, merged.nbd.key, merged.nbd.connections) == ("other.pem", "key.pem", 16)
    with pytest.raises(InvalidRequestError, match="tls"):
        merge_flags(config, nbd={"tls": "never"})
    with pytest.raises(InvalidRequestError, match="needs its key"):
        merge_flags(ServeConfig(), nbd={"certificate": "cert.pem"})


def test_a_disk_can_be_imported(tmp_path: Path) -> None:
    """By the file and by the flag; only from an NBD server, and not over a base."""
    uri = "nbds://nas/vm1?tls-certificates=/etc/pki"
    name, volume = parse_volume_flag(f"disk=disk.img,import={uri}")
    assert (name, volume.import_from) == ("disk", uri)
    text = f"[groups.vm1.volumes.disk]\npath = 'x'\nimport = '{uri}'\n"
    assert load_config(write(tmp_path, text)).groups["vm1"].volumes["disk"] == VolumeConfig(
        path="x", import_from=uri
    )
    for wrong, expected in (
        (text.replace("nbds:", "http:"), "NBD server"),
        (f"{text}base = 'y'", "not both"),
    ):
        with pytest.raises(InvalidRequestError, match=expected):
            load_config(write(tmp_path, wrong))
