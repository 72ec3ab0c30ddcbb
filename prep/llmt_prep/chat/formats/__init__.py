"""Records to chats and pairs: which format a source has, and the function that reads its records."""

from llmt_prep.chat.formats.detection import FORMATS, detect, reader

__all__ = ["FORMATS", "detect", "reader"]
