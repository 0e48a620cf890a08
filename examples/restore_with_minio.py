"""Restore a volume from S3 with minio-py alone: no Silo, only docs/formats/store.md.

    restore_with_minio.py ENDPOINT BUCKET GROUP VOLUME IMAGE [PREFIX [GENERATION]]

Writes the newest generation, or a kept one, into a sparse file, and verifies every byte. The credentials are in
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Needs minio, blake3 and zstandard from PyPI.
"""

import base64
import json
import os
import struct
import sys
from urllib.parse import urlsplit

import blake3
import zstandard
from minio import Minio

endpoint, bucket, group, volume, image, prefix, generation = [*sys.argv[1:], "", ""][:7]
at = urlsplit(endpoint)
keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
s3 = Minio(at.netloc, *keys, secure=at.scheme == "https", region=os.environ.get("AWS_REGION", "us-east-1"))


def get(key: str, start: int = 0, length: int = 0) -> bytes:
    answer = s3.get_object(bucket, f"{prefix.rstrip('/')}/{key}".lstrip("/"), start, length)
    with answer:
        return answer.read()


def verified(data: bytes, digest: bytes) -> bytes:
    if blake3.blake3(data).digest() != digest:
        sys.exit("a digest does not match")
    return data


def names(data: bytes, start: int) -> tuple[list[str], int]:
    (count,), at, found = struct.unpack_from("<I", data, start), start + 4, []
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, at)
        found.append(data[at + 2 : at + 2 + length].decode())
        at += 2 + length
    return found, at + (start - at) % 8


envelope = get(f"{group}/points/{int(generation):012d}" if generation else f"{group}/head")
head = json.loads(verified(envelope[84:-1], bytes.fromhex(json.loads(envelope)["blake3"])))
if (head["format"], head["incompat"]) != (1, 0):
    sys.exit("written by a newer version")
info = next(v for v in head["volumes"] if v["name"] == volume)
chunks = {}  # chunk: (kind, key, offset, length, digest)

if root := head.get("root"):
    if "inline" in root:
        root = base64.b64decode(root["inline"])
    else:
        part = root["stored"]
        root = verified(get(part["key"], part["offset"], part["length"]), bytes.fromhex(part["digest"]))
    volumes, at = names(root, 24)
    per_page = struct.unpack_from(f"<{len(volumes)}I", root, at)
    objects, at = names(root, at + (len(volumes) + 1) // 2 * 8)
    for number, _, page, key, length, offset, digest in struct.iter_unpack("<HHIIIQ32s", root[at:]):
        if volumes[number] == volume:
            data = verified(get(objects[key], offset, length), digest)
            owners, at = names(data, 24)
            for entry, slot in enumerate(struct.iter_unpack("<BBHIQII32s", data[at:])):
                where = owners[slot[3] + 1] if slot[0] < 3 else ""
                chunks[page * per_page[number] + entry] = slot[0], where, slot[4], slot[5], slot[7]

for part in head["segments"]:
    index = verified(
        get(part["key"], part["index_offset"], part["index_length"]), bytes.fromhex(part["index_digest"])
    )
    owners, at = names(index, 0)
    for number, kind, _, count, first, offset, length, _, digest in struct.iter_unpack(
        "<HBBIQQII32s", index[at:]
    ):
        if owners[number + 1] == volume:
            chunks |= dict.fromkeys(range(first, first + count), (kind, part["key"], offset, length, digest))

with open(image, "wb") as file:
    file.truncate(info["size"])
    for chunk, (kind, key, offset, length, digest) in sorted(chunks.items()):
        if kind > 3:
            sys.exit("a base image is needed, or a newer version of this script")
        if kind < 3:
            data = get(key, offset, length)
            file.seek(chunk * info["chunk_size"])
            file.write(verified(data if kind == 1 else zstandard.decompress(data), digest))
print(f"{group}/{volume}: generation {head['generation']}, {info['size']} bytes, every digest verified")
