"""GGUF checkpoints: every metadata key and every tensor of the file is used, known to be irrelevant, or refused.

``transformers`` reads GGUF too, but drops rotation factors, rotary scaling, biases, windows and stop tokens without
a word.  Here nothing is dropped: ``open_gguf`` reads the file, ``config_of`` turns metadata into a config,
``weights_of`` names the tensors, ``tokenizer_of`` builds the tokenizer, and ``refuse_unread`` names what is left.
"""

from .config import config_of
from .file import GgufFile, open_gguf
from .tokenizer import tokenizer_of
from .weights import load_weights

__all__ = ["GgufFile", "config_of", "load_weights", "open_gguf", "tokenizer_of"]
