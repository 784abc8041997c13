"""The pieces in which a model reads a long text, so that it takes less memory."""

# The most tokens that a model reads at a time, since a layer's results for all of them, and the logits, are in memory.
PIECE = 256


def pieces(tokens: int, *, last: int, original: int | None) -> list[tuple[int, int]]:
    """Return the starts and ends of the pieces of a text of `tokens` tokens; the last has the text's `last` tokens.

    With LongRoPE the keys of a piece depend on whether the text so far is longer than the `original` limit. So the
    first piece of a longer text ends beyond that limit.
    """
    piece = piece_size(tokens)
    first = original + 1 if original and tokens > original else piece
    ends = [*range(first, tokens - last, piece), tokens]
    return list(zip([0, *ends], ends, strict=False))


def piece_size(tokens: int) -> int:
    """Return how many of `tokens` a model should read at a time: at most PIECE, and so that its cache wastes no memory.

    When its cache of keys and values is full, OpenVINO's CPU plugin makes one of twice the length. With pieces of equal
    size the caches have room for 2, 6, 14, 30... pieces. With one of these numbers of pieces the last cache is just as
    long as the text.
    """
    pieces = 1
    while -(-tokens // pieces) > PIECE:
        pieces = 2 * pieces + 2 if pieces > 1 else 2
    return -(-tokens // pieces)
