"""Image sets: where images come from, how they are decoded, and the views under which they are seen. Without torch."""

from pipeline.images.decoding import CorruptImage, DecodePolicy, decode
from pipeline.images.digits import DigitsSource
from pipeline.images.folders import FolderSource
from pipeline.images.imageset import ImageSet, Skipped, drop_corrupt, index_files, recall_root, remember_root
from pipeline.images.listing import Listing, digest_listing
from pipeline.images.sources import ImageSource, content_id, list_images
from pipeline.images.views import ViewPolicy, Views, view_ids

__all__ = [
    "CorruptImage",
    "DecodePolicy",
    "DigitsSource",
    "FolderSource",
    "ImageSet",
    "ImageSource",
    "Listing",
    "Skipped",
    "ViewPolicy",
    "Views",
    "content_id",
    "decode",
    "digest_listing",
    "drop_corrupt",
    "index_files",
    "list_images",
    "recall_root",
    "remember_root",
    "view_ids",
]
