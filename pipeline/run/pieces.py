"""The pieces in which a model reads a long text, so that it takes less memory."""

# The most tokens that a model reads at a time, since a layer's results for all of them, and the logits, are in memory.
PIECE = 256


def pieces(tokens: int, *, last: int, at_once: bool) -> list[tuple[int, int]]:
    """Return the starts and ends of the pieces of a text of `tokens` tokens; the last has the text's `last` tokens.

    A model with LongRoPE has to read all of the text `at_once`, since the keys of a piece depend on the length of the
    text so far.
    """
    piece = tokens if at_once else piece_size(tokens)
    ends = [*range(piece, tokens - last, piece), tokens]
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
