"""Numbers that several kernels, the C code and the definition in ``mbq_export.format`` must agree on.

``build.config_header`` passes those that C needs to the compiler. The numbers of the stored layout are in
``mbq_runtime.bundle.layout``.
"""

from __future__ import annotations

MEAN_SQUARE_EPS = 1e-12
"""A router adds this to the mean square of a token, so that its logarithm exists for a token of zeros."""

UNIT_EPS = 1e-6
"""A delta net adds this to the sum of squares of a query or a key before it divides by its length."""

SMALLEST_ACTIVATION = 1e-30
"""A group of activations counts as zero if its largest magnitude is below this. Its inverse would overflow."""

LOW_BITS = 8
"""A two-byte activation is ``(high << LOW_BITS) + low``."""

FEW_TOKENS = 8
"""Up to this many tokens of one depth, a pass unpacks weights to registers. With more, it unpacks them to a tile."""

MAX_HIDDEN = 512
"""The largest hidden width of a router. The C code and the drivers reserve memory for it."""

MOST_HEAD_DIM = 512
"""The widest head that attention over a cache of 8 bits takes. The C code reserves memory for it."""

MAX_THREADS = 64
"""The most threads that a kernel library uses."""

PIECES_PER_THREAD = 3
"""A parallel loop is cut into this many pieces for each thread. Cores of different speed then finish together."""

WEIGHT_STEPS = 255
"""With keys and values of 8 bits: the largest rounded weight of a value."""

WEIGHT_TOKENS = 64
"""With keys and values of 8 bits: neighbouring tokens whose weights share a step, from a multiple of this on."""
