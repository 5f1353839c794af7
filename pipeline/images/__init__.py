"""Image sets: sources of images, decoding, and views (crops and flips). Without torch."""

from pipeline.images.decoding import CorruptImage, DecodePolicy, UnreadableImage, decode
from pipeline.images.digits import DigitsSource
from pipeline.images.exclusions import exclude, identify_exclusions, read_exclusions, without, write_exclusions
from pipeline.images.folders import FolderSource
from pipeline.images.imageset import ImageSet, Met, ignore, index_files, recall_root
from pipeline.images.listing import Listing, Problem, describe_left_out, digest_listing, name_some
from pipeline.images.sources import ImageSource, identify, list_images
from pipeline.images.views import ViewPolicy, Views

__all__ = [
    "CorruptImage",
    "DecodePolicy",
    "DigitsSource",
    "FolderSource",
    "ImageSet",
    "ImageSource",
    "Listing",
    "Met",
    "Problem",
    "UnreadableImage",
    "ViewPolicy",
    "Views",
    "decode",
    "describe_left_out",
    "digest_listing",
    "exclude",
    "identify",
    "identify_exclusions",
    "ignore",
    "index_files",
    "list_images",
    "name_some",
    "read_exclusions",
    "recall_root",
    "without",
    "write_exclusions",
]
