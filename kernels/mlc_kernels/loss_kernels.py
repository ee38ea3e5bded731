# mypy: ignore-errors
# (A kernel is written in Triton's language, which only looks like Python.)
"""Triton kernels of the MLC loss and of singular values: one launch forward, one backward, and one to sum the losses.

With many features, a launch of ``gram_parts`` may come first (``split.py``).

Nothing here runs at import. The mathematics is the same as in ``closed_form``; docs/kernel.md explains each step.
All arithmetic is float64; only loads and stores have other types.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The last sweep is the first one in which no pair of columns had a cosine above bound * sqrt(gap). The gap is the
# relative difference of their squared lengths, and the sine of the rotation is about the cosine over the gap. A sweep
# leaves cosines of about cosine times sine, so the last one leaves the square of the bound. That is 1e-14 for float64
# rows. For others it is 1e-10, a six-hundredth of what rounding to float32 does, which is reached a third of a sweep
# earlier. A bound without the gap would stop at columns of nearly equal lengths, where rotations are large and undo
# each other. (The constants are squares of twice the bound.) Random spectra take 6 sweeps at L = 10 and 10 at L = 64.
_BOUND_WIDE = tl.constexpr(4e-14)
_BOUND = tl.constexpr(4e-10)
_ROUNDING = tl.constexpr(4e-26)  # the square of twice a cosine that is nothing but rounding
_MAX_SWEEPS = tl.constexpr(30)  # only guards against an endless loop
_EPSILON = tl.constexpr(2.220446049250313e-16)  # machine epsilon of float64


@triton.jit
def _load_rows(pointers, present, first, features, BLOCK: tl.constexpr):
    """(TILE, BLOCK) float64: features from ``first`` on, of rows that begin at ``pointers``; 0 where none exist."""
    feature = first + tl.arange(0, BLOCK)
    inside = present[:, None] & (feature < features)[None, :]
    return tl.load(pointers[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _products(left, right, total, DOT: tl.constexpr):
    """``total + left @ right.T`` for (TILE, K) float64."""
    if DOT:
        return tl.dot(left, tl.trans(right), total, out_dtype=tl.float64)
    else:  # noqa: RET505, without it Triton compiles both ways
        # Column by column: no intermediate is larger than the result.
        position = tl.arange(0, left.shape[1])
        for column in range(left.shape[1]):
            here = (position == column)[None, :]
            one = tl.sum(tl.where(here, left, 0.0), axis=1)
            other = tl.sum(tl.where(here, right, 0.0), axis=1)
            total += one[:, None] * other[None, :]
        return total


@triton.jit
def _partners(column, turn, opposite, players):
    """Each player's partner in a turn of a round-robin tournament. The last player's is ``opposite``; padding has none.

    In turn t, player i meets t - i, modulo the number of all but the last player. One of them would meet itself, and
    meets the last one instead: the player t / 2, where halving is a product with half the number of players.
    """
    partner = turn - column
    partner = tl.where(partner < 0, partner + players - 1, partner)
    partner = tl.where(partner == column, players - 1, partner)
    partner = tl.where(column == players - 1, opposite, partner)
    return tl.where(column < players, partner, column)


@triton.jit
def _next_opposite(opposite, players):
    """The last player's partner in the next turn, ``turn * (players // 2) % (players - 1)`` without a division.

    A division by a number that is not known to the compiler would be the longest part of a turn.
    """
    opposite += players // 2
    return tl.where(opposite < players - 1, opposite, opposite - (players - 1))


@triton.jit
def _orthogonal_columns(matrix, languages, BOUND: tl.constexpr, TILE: tl.constexpr):
    """``matrix @ V`` with orthogonal columns, V orthogonal: one-sided cyclic Jacobi.

    For a positive semi-definite G, each resulting column is an eigenvalue times its eigenvector. In a turn every
    column has one partner, as in a round-robin tournament of ``languages`` players (one more if that is odd). Both
    compute the same two sums, and each rotates itself: one gather, two sums, and no other communication.
    """
    column = tl.arange(0, TILE)
    players = languages + languages % 2
    # This gather changes no value. It makes the compiler keep the matrix in the register layout of a gather from here
    # on; otherwise every turn would convert from and to the layout of the product before the loop.
    matrix = tl.gather(matrix, tl.broadcast_to(column[None, :], [TILE, TILE]), 1)
    turning = 1
    sweep = 0
    while (turning > 0) & (sweep < _MAX_SWEEPS):
        square = tl.sum(matrix * matrix, axis=0)
        # Columns that are 0 up to rounding would rotate against each other forever.
        bound = languages * _EPSILON
        negligible = tl.max(square, axis=0) * bound * bound
        turned = tl.zeros([TILE], tl.int32)
        opposite = 0
        for turn in range(players - 1):
            partner = _partners(column, turn, opposite, players)
            opposite = _next_opposite(opposite, players)
            other = tl.gather(matrix, tl.broadcast_to(partner[None, :], [TILE, TILE]), 1)
            # Twice the inner product, and |other|^2 - |own|^2, written so that nothing cancels and that the partners
            # get exactly opposite values. Summed as one tensor: one exchange between the warps instead of two.
            sums = tl.sum(tl.join(2.0 * matrix * other, (other - matrix) * (other + matrix)), axis=0)
            twice, difference = tl.split(sums)
            both = (partner != column) & (tl.minimum(square, square + difference) > negligible)
            longer = tl.maximum(square, square + difference)
            allowed = tl.maximum(tl.abs(difference) * BOUND, longer * (_ROUNDING))  # the gap is |difference| / longer
            over = twice * twice * longer > square * (square + difference) * allowed
            turned = turned | (both & over).to(tl.int32)
            # The smaller angle that makes the pair orthogonal, from its double angle: no division, no tangent.
            long = difference * difference + twice * twice
            inverse = tl.rsqrt(tl.where(long == 0.0, 1.0, long))
            cosine_squared = 0.5 + 0.5 * tl.abs(difference) * inverse
            root = tl.rsqrt(cosine_squared)
            idle = (partner == column) | (long == 0.0)
            cosine = tl.where(idle, 1.0, cosine_squared * root)
            first = (difference > 0.0) | ((difference == 0.0) & (column < partner))
            sine = 0.5 * twice * inverse * root
            sine = tl.where(idle, 0.0, tl.where(first, sine, -sine))
            matrix = cosine[None, :] * matrix - sine[None, :] * other
            square += sine * (sine * difference - cosine * twice)
        turning = tl.max(turned, axis=0)
        sweep += 1
    return matrix


@triton.jit
def _row_pointers(
    rows_ptr,
    mask_ptr,
    table_ptr,
    prompt,
    languages,
    prompt_stride,
    row_stride,
    mask_prompt_stride,
    mask_row_stride,
    HAS_MASK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """(TILE,) pointers to the rows of a prompt, and (TILE,) bool: whether each is there."""
    row = tl.arange(0, TILE)
    inside = row < languages
    present = inside
    if HAS_TABLE:
        index = tl.load(table_ptr + prompt * languages + row, mask=inside, other=-1)
        present = index >= 0
        pointers = rows_ptr + tl.where(present, index, 0) * row_stride
    else:
        pointers = rows_ptr + prompt * prompt_stride + row.to(tl.int64) * row_stride
    if HAS_MASK:
        mask = tl.load(mask_ptr + prompt * mask_prompt_stride + row * mask_row_stride, mask=inside, other=0)
        present = present & (mask != 0)
    return pointers, present


@triton.jit
def _gram(
    pointers,
    present,
    begin,
    end,
    RESCALE: tl.constexpr,
    DOT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(TILE, TILE) float64 inner products of features ``begin`` to ``end`` of the rows, and what each was divided by.

    The latter is (TILE,): an inverse, 1 unless RESCALE, else that of the row's largest entry.
    """
    shrink = tl.full([TILE], 1.0, tl.float64)
    if RESCALE:
        largest = tl.full([TILE], 1e-300, tl.float64)
        for first in range(begin, end, BLOCK):
            block = _load_rows(pointers, present, first, end, BLOCK)
            largest = tl.maximum(largest, tl.max(tl.abs(block), axis=1))
        shrink = 1.0 / largest

    # The next block is loaded while this one is multiplied. It is kept as float64, because the compiler (3.7) fails
    # on a float64 product whose operand it can trace back to a narrower load.
    products = tl.zeros([TILE, TILE], tl.float64)
    block = _load_rows(pointers, present, begin, end, BLOCK)
    if RESCALE:
        block = block * shrink[:, None]
    for first in range(begin + BLOCK, end + BLOCK, BLOCK):
        products = _products(block, block, products, DOT)
        block = _load_rows(pointers, present, first, end, BLOCK)
        if RESCALE:
            block = block * shrink[:, None]
    return products, shrink


@triton.jit(
    do_not_specialize=[
        "languages",
        "features",
        "steps",
        "prompt_stride",
        "row_stride",
        "mask_prompt_stride",
        "mask_row_stride",
    ]
)
def gram_parts(
    rows_ptr,  # this and the next two as in prompt_forward
    mask_ptr,
    table_ptr,
    out_ptr,  # (B, PARTS, L + 1, L) float64: what _gram returns for each part of the features
    languages,
    features,
    steps,  # a part has this many blocks of features, the last one fewer, or none
    prompt_stride,
    row_stride,
    mask_prompt_stride,
    mask_row_stride,
    HAS_MASK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    RESCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DOT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per prompt and part of the features: rows -> Gram matrix of that part."""
    begin = tl.program_id(1) * steps * BLOCK
    end = tl.minimum(begin + steps * BLOCK, features)
    if ALIGNED:
        end = end // 16 * 16
        prompt_stride = prompt_stride // 16 * 16
        row_stride = row_stride // 16 * 16
    prompt = tl.program_id(0).to(tl.int64)
    pointers, present = _row_pointers(
        rows_ptr,
        mask_ptr,
        table_ptr,
        prompt,
        languages,
        prompt_stride,
        row_stride,
        mask_prompt_stride,
        mask_row_stride,
        HAS_MASK,
        HAS_TABLE,
        TILE,
    )
    products, shrink = _gram(pointers, present, begin, end, RESCALE, DOT, TILE, BLOCK)
    row = tl.arange(0, TILE)
    inside = row < languages
    out = out_ptr + (prompt * tl.num_programs(1) + tl.program_id(1)) * (languages + 1) * languages
    both = inside[:, None] & inside[None, :]
    tl.store(out + row[:, None] * languages + row[None, :], products, mask=both)
    tl.store(out + languages * languages + row, shrink, mask=inside)


@triton.jit
def _sum_of_parts(parts, languages, RESCALE: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr):
    """What ``_gram`` would return for all features, from what ``gram_parts`` stored, always added in the same order."""
    row = tl.arange(0, TILE)
    inside = row < languages
    both = inside[:, None] & inside[None, :]
    size = (languages + 1) * languages
    shrink = tl.full([TILE], 1.0, tl.float64)
    if RESCALE:
        shrink = tl.full([TILE], 1e300, tl.float64)
        for part in range(PARTS):
            own = tl.load(parts + part * size + languages * languages + row, mask=inside, other=1.0)
            shrink = tl.minimum(shrink, own)
    products = tl.zeros([TILE, TILE], tl.float64)
    for part in range(PARTS):
        one = tl.load(parts + part * size + row[:, None] * languages + row[None, :], mask=both, other=0.0)
        if RESCALE:
            # At most 1. Features that are too small compared with those of other parts become 0.
            ratio = shrink / tl.load(parts + part * size + languages * languages + row, mask=inside, other=1.0)
            one = one * ratio[:, None] * ratio[None, :]
        products += one
    return products, shrink


@triton.jit(
    do_not_specialize=[
        "temperature_bits",
        "counted_at",
        "languages",
        "features",
        "prompt_stride",
        "row_stride",
        "mask_prompt_stride",
        "mask_row_stride",
    ]
)
def prompt_forward(
    rows_ptr,  # (B, L, D) by strides, or (rows, D) with a table. PARTS > 1: what gram_parts stored
    mask_ptr,  # (B, L) bool by strides; any pointer if there is no mask, or PARTS > 1
    table_ptr,  # (B, L) int64 row of each translation, -1 where missing; any pointer if there is no table, or PARTS > 1
    out_ptr,  # OUTPUT "values": (B, L). Else (B,): losses, and from element counted_at on 1.0 where the prompt counts
    saved_ptr,  # OUTPUT "gradient": (B, L + 1, L) float64: bracket and inverse lengths. Else any pointer
    temperature_bits: tl.int64,  # a float argument would arrive as float32
    counted_at,  # 0: nobody asks whether prompts count
    languages,
    features,
    prompt_stride,
    row_stride,
    mask_prompt_stride,
    mask_row_stride,
    OUTPUT: tl.constexpr,  # "values", "loss" or "gradient" (the loss, and all that the backward pass needs)
    HAS_MASK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    DIVIDE_BY_TOP: tl.constexpr,
    RESCALE: tl.constexpr,  # float64 rows: their squares may over- or underflow
    ALIGNED: tl.constexpr,  # strides and features are multiples of 16: wide loads
    DOT: tl.constexpr,
    TILE: tl.constexpr,  # L, padded
    BLOCK: tl.constexpr,  # features in one step
    PARTS: tl.constexpr,  # 1, or number of parts of the Gram matrix
):
    """One program per prompt: rows -> Gram matrix -> spectrum -> loss -> matrix of the gradient."""
    if ALIGNED:
        features = features // 16 * 16
        prompt_stride = prompt_stride // 16 * 16
        row_stride = row_stride // 16 * 16
    prompt = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, TILE)
    inside = row < languages
    if PARTS == 1:
        pointers, present = _row_pointers(
            rows_ptr,
            mask_ptr,
            table_ptr,
            prompt,
            languages,
            prompt_stride,
            row_stride,
            mask_prompt_stride,
            mask_row_stride,
            HAS_MASK,
            HAS_TABLE,
            TILE,
        )
        products, shrink = _gram(pointers, present, 0, features, RESCALE, DOT, TILE, BLOCK)
    else:
        parts = rows_ptr + prompt * PARTS * (languages + 1) * languages
        products, shrink = _sum_of_parts(parts, languages, RESCALE, PARTS, TILE)

    square = tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), axis=1)
    # A row with an infinity has no direction. Its inverse length would be 0, as for a missing row.
    square = tl.where(square == float("inf"), float("nan"), square)
    present = square != 0.0  # also True for NaN, which must reach the loss and not vanish
    inverse = tl.where(present, tl.rsqrt(tl.where(present, square, 1.0)), 0.0)
    gram = products * inverse[:, None] * inverse[None, :]
    count = tl.sum(present.to(tl.int32), axis=0)
    counted = count >= 2
    # NaN would spread to every column, and comparisons with it would end the sweeps, so it is put back at the end. It
    # is not found by gram - gram: the compiler fuses that with the product before it, which leaves a rounding error.
    broken_cells = tl.where(tl.abs(gram) < float("inf"), 0, 1)
    finite = tl.sum(tl.sum(broken_cells, axis=1), axis=0) == 0

    bound: tl.constexpr = _BOUND_WIDE if RESCALE else _BOUND
    columns = _orthogonal_columns(tl.where(finite, gram, 0.0), languages, bound, TILE)
    eigenvalue = tl.sqrt(tl.sum(columns * columns, axis=0))
    value = tl.sqrt(eigenvalue)
    # Position in descending order; missing rows come last.
    key = tl.where(present, value, -1.0)
    ahead = (key[:, None] > key[None, :]) | ((key[:, None] == key[None, :]) & (row[:, None] < row[None, :]))
    rank = tl.sum(ahead.to(tl.int32), axis=0)
    taken = rank < tl.minimum(count, features)
    broken = float("nan")

    if OUTPUT == "values":
        value = tl.where(taken, tl.where(finite, value, broken), 0.0)
        tl.store(out_ptr + prompt * languages + rank, value.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        temperature = temperature_bits.to(tl.float64, bitcast=True)
        top = tl.where(counted & finite, tl.max(value, axis=0), 1.0)
        steepness = 1.0 / (temperature * top if DIVIDE_BY_TOP else temperature)
        weight = tl.where(taken, tl.exp((value - top) * steepness), 0.0)
        total = tl.where(counted & finite, tl.sum(weight, axis=0), 1.0)
        loss = tl.where(counted, tl.where(finite, tl.log(total), broken), 0.0)
        tl.store(out_ptr + prompt, loss.to(out_ptr.dtype.element_ty))
        tl.store(out_ptr + counted_at + prompt, counted.to(out_ptr.dtype.element_ty), mask=counted_at > 0)
        if OUTPUT == "gradient":
            slope = (weight * (1.0 / total) - (rank == 0).to(tl.float64)) * steepness
            # A singular value below this is 0 up to rounding, and has no gradient: take the zero subgradient.
            usable = taken & (value > tl.sqrt(languages * _EPSILON) * top)
            # Also divide by the squared length of the column, so that the product below is one of unit vectors.
            slope = tl.where(usable, slope / tl.where(usable, value * eigenvalue * eigenvalue, 1.0), 0.0)
            along = tl.sum((slope * eigenvalue)[None, :] * columns * columns, axis=1)
            outer = tl.zeros([TILE, TILE], tl.float64)
            outer = _products(columns * slope[None, :], columns, outer, DOT)
            bracket = tl.where(row[:, None] == row[None, :], outer - along[:, None], outer)
            bracket = tl.where(finite, bracket, broken)
            saved = saved_ptr + prompt * (languages + 1) * languages
            both = inside[:, None] & inside[None, :]
            tl.store(saved + row[:, None] * languages + row[None, :], bracket, mask=both)
            # A prompt that does not count has no gradient, whatever its rows hold: they are treated as missing.
            inverse = tl.where(counted, inverse * shrink, 0.0)
            tl.store(saved + languages * languages + row, inverse, mask=inside)


@triton.jit(do_not_specialize=["prompts"])
def sum_losses(
    losses_ptr,  # (2, B): losses, and 1.0 where the prompt counts
    out_ptr,  # () sum or mean
    count_ptr,  # () float64 number of prompts that count, at least 1
    prompts,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the sum or the mean of all losses, added in float64, in an order that depends on B alone."""
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for first in range(0, prompts, BLOCK):
        prompt = first + tl.arange(0, BLOCK)
        inside = prompt < prompts
        total += tl.load(losses_ptr + prompt, mask=inside, other=0.0).to(tl.float64)
        count += tl.load(losses_ptr + prompts + prompt, mask=inside, other=0.0).to(tl.float64)
    number = tl.maximum(tl.sum(count, axis=0), 1.0)
    result = tl.sum(total, axis=0)
    if MEAN:
        result = result / number
    tl.store(out_ptr, result.to(out_ptr.dtype.element_ty))
    tl.store(count_ptr, number)


@triton.jit
def _weighted_rows(
    rows_ptr,
    table_ptr,
    saved,
    prompt,
    languages,
    features,
    feature,
    prompt_stride,
    row_stride,
    HAS_TABLE: tl.constexpr,
    DOT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(TILE, BLOCK) float64: the bracket, times inverse lengths, times rows that are not missing."""
    row = tl.arange(0, TILE)
    inside = row < languages
    total = tl.zeros([TILE, BLOCK], tl.float64)
    if DOT:
        # No load waits for another one, except for the rows, because missing ones may hold NaN.
        inverse = tl.load(saved + languages * languages + row, mask=inside, other=0.0)
        both = inside[:, None] & inside[None, :]
        bracket = tl.load(saved + row[:, None] * languages + row[None, :], mask=both, other=0.0) * inverse[None, :]
        present = inverse != 0.0
        if HAS_TABLE:
            index = tl.load(table_ptr + prompt * languages + row, mask=inside, other=0)
            pointers = rows_ptr + tl.where(present, index, 0) * row_stride
        else:
            pointers = rows_ptr + prompt * prompt_stride + row.to(tl.int64) * row_stride
        block = _load_rows(pointers, present, tl.program_id(1) * BLOCK, features, BLOCK)
        # One step. As in the forward pass, an operand that comes out of a loop hides from the compiler that it was
        # loaded as a narrower type.
        for _ in range(0, languages, TILE):
            total = tl.dot(bracket, block, total, out_dtype=tl.float64)
            block = -block
    else:
        for other in range(languages):
            inverse = tl.load(saved + languages * languages + other)
            if HAS_TABLE:
                begin = tl.load(table_ptr + prompt * languages + other) * row_stride
            else:
                begin = prompt * prompt_stride + row_stride.to(tl.int64) * other
            # Do not load missing rows: they may hold NaN.
            loaded = feature < tl.where(inverse != 0.0, features, 0)
            line = tl.load(rows_ptr + begin + feature, mask=loaded, other=0.0).to(tl.float64)
            # The bracket is symmetric, so its row is its column.
            column = tl.load(saved + other * languages + row, mask=inside, other=0.0)
            total += (column * inverse)[:, None] * line[None, :]
    return total


@triton.jit(do_not_specialize=["languages", "features", "prompt_stride", "row_stride", "grad_stride"])
def prompt_backward(
    rows_ptr,  # as in prompt_forward
    table_ptr,  # as in prompt_forward
    saved_ptr,  # (B, L + 1, L) float64
    grad_ptr,  # (B,) by stride: gradient of each prompt's loss
    count_ptr,  # MEAN: () number of prompts that the loss is the mean over, at least 1. Else any pointer
    out_ptr,  # (B, L, D), every element is written. With a table: (rows, D), only the table's rows are written
    languages,
    features,
    prompt_stride,
    row_stride,
    grad_stride,
    MEAN: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DOT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per prompt and BLOCK features: bracket times rows, times the incoming gradient."""
    if ALIGNED:
        features = features // 16 * 16
        prompt_stride = prompt_stride // 16 * 16
        row_stride = row_stride // 16 * 16
    prompt = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, TILE)
    inside = row < languages
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = feature < features
    saved = saved_ptr + prompt * (languages + 1) * languages
    total = _weighted_rows(
        rows_ptr,
        table_ptr,
        saved,
        prompt,
        languages,
        features,
        feature,
        prompt_stride,
        row_stride,
        HAS_TABLE,
        DOT,
        TILE,
        BLOCK,
    )
    grad = tl.load(grad_ptr + prompt * grad_stride).to(tl.float64)
    if MEAN:
        grad = grad / tl.load(count_ptr).to(tl.float64)
    inverse = tl.load(saved + languages * languages + row, mask=inside, other=0.0)
    total = tl.where((inverse != 0.0)[:, None], total * (grad * inverse)[:, None], 0.0)
    if HAS_TABLE:
        index = tl.load(table_ptr + prompt * languages + row, mask=inside, other=-1)
        begin = index * features
        inside = index >= 0
    else:
        begin = (prompt * languages + row) * features
    where = out_ptr + begin[:, None] + feature[None, :]
    if out_ptr.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)  # 16-bit types are converted from float32
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & within[None, :])
