"""The small bundled model: it answers questions about facts stated in long documents.

It exists so that the server, its examples and its tests run offline on a laptop. ``MODEL_PATH`` is a plain
``transformers`` directory; the other modules made it: :mod:`~pacellm.demo.generator` writes the documents,
:mod:`~pacellm.demo.train` trains on them and :mod:`~pacellm.demo.evaluate` measures recall.
"""

from pathlib import Path

MODEL_PATH: Path = Path(__file__).parent / "weights"

__all__ = ["MODEL_PATH"]
