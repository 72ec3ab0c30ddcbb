"""Which objects a source means by URL: as in `files`, but a store has no folders, only names, which it lists."""

import fnmatch
import glob
from collections.abc import Sequence

from llmt_prep.documents.files import is_wanted, nothing_wanted, require_records
from llmt_prep.documents.record import Reading
from llmt_shared.errors import ConfigError
from llmt_shared.objects import ObjectFile, ObjectPath

_SAVED = ("dataset_dict.json", "state.json")
"""What `datasets` leaves beside the data that it saves."""


def find_objects(patterns: Sequence[str], reading: Reading) -> list[ObjectFile]:
    """Return the objects that the URLs mean, sorted and each once.

    A URL is an object, a glob (``**`` is recursive), or a "folder": all objects of known suffixes below it, without
    hidden ones. Of a web server, which lists nothing, it is an object.

    Raises:
        ConfigError: a URL matches nothing, there is no such bucket, or it names an object whose suffix says nothing
            while the reader is `auto`.
    """
    found = {each.path: each for pattern in patterns for each in _match(pattern, reading)}
    return [found[path] for path in sorted(found)]


def _match(url: str, reading: Reading) -> Sequence[ObjectFile]:
    path = ObjectPath(url)
    if not path.can_list and glob.has_magic(url):
        raise ConfigError(f"{url}: a web server does not list its files, so that none can match; name each in `path:`")
    if path.can_list and not path.key:
        return _folder(path, reading)  # of a bucket alone some stores say that it is an object
    try:
        files = [ObjectFile(path, path.stat())]
    except FileNotFoundError as error:
        if not path.can_list:
            raise ConfigError(f"{url}: {error.strerror}; mend `path:`") from None
        if not glob.has_magic(url):
            return _folder(path, reading)
        files = _glob(path)
    for each in files:
        require_records(str(each.path), reading)
    return files


def _glob(pattern: ObjectPath) -> list[ObjectFile]:
    parts = pattern.key.split("/")
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    folder = ObjectPath("/".join([pattern.root, *parts[:fixed]]))
    files = [each for each in _below(folder) if _is_match(_names(each, folder), parts[fixed:])]
    if not files:
        raise ConfigError(f"{pattern}: matches no file; mend `path:`")
    return files


def _folder(folder: ObjectPath, reading: Reading) -> list[ObjectFile]:
    everything = _below(folder)
    if not everything:
        raise ConfigError(f"{folder}: no such file or folder; mend `path:`")
    for each in everything:
        if each.path.name in _SAVED:
            raise ConfigError(
                f"{folder}: holds a dataset that `datasets` saved ({each.path}); "
                f"name its data files in `path:`, such as {str(each.path).removesuffix(each.path.name)}data-*.arrow"
            )
    seen = (each for each in everything if not any(name.startswith(".") for name in _names(each, folder)))
    files = [each for each in seen if is_wanted(str(each.path), reading)]
    if not files:
        raise nothing_wanted(str(folder), f"{folder}/**/*.dat", reading)
    return files


def _below(folder: ObjectPath) -> list[ObjectFile]:
    """All objects below a name but those that only stand for folders, which some tools make."""
    try:
        found = list(folder.files())
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: {error.strerror}; mend `path:`") from None
    parts = [each.path.url.split("/") for each in found]
    folders = {"/".join(names[:depth]) for names in parts for depth in range(3, len(names))}
    return [each for each in found if each.stat.st_size or each.path.url not in folders]


def _names(file: ObjectFile, folder: ObjectPath) -> list[str]:
    return file.path.url.removeprefix(f"{folder}/").split("/")


def _is_match(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a glob match the names of a path, as in the module `glob`."""
    if not names or not parts:
        return not names and not parts
    if parts[0] == "**":
        is_here = _is_match(names, parts[1:] or ["*"])
        return is_here or (not names[0].startswith(".") and _is_match(names[1:], parts))
    if names[0].startswith(".") and not parts[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(names[0], parts[0]) and _is_match(names[1:], parts[1:])
