"""How predictable are the codes of a token set? `python count_codes.py path/to/token-set`"""

from __future__ import annotations

import sys

from models.bigram import Bigram

import smalti

LARGEST_TABLE = 4096  # codes; the table of pairs grows with the square


def main(path: str) -> None:
    token_set = smalti.open_tokens(path, verify="crc")
    print(token_set)
    if token_set.codes > LARGEST_TABLE:
        sys.exit(f"{token_set.codes} codes are too many for a table of pairs, at most {LARGEST_TABLE}")
    held_out = min(512, len(token_set) // 5)
    epoch = token_set.epoch(held_out, seed=0, epoch=0)
    _, unseen_BT, _ = next(epoch)
    model = Bigram(token_set.codes)
    for _, codes_BT, _ in epoch:
        model.count(codes_BT)
    alone, after = model.bits_per_code(unseen_BT)
    print(f"bits per code of {held_out} unseen rows: {alone:.2f} alone, {after:.2f} after the code before")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except smalti.SmaltiError as error:
        sys.exit(f"error: {error}")
