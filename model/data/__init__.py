"""Text in, batches out: sources of documents, a byte store on disk, random crops from it, and the curriculum."""

from .crops import CropSampler
from .curriculum import BUILTIN_CURRICULA, Curriculum, Stage, load_curriculum
from .errors import DataError
from .sources import SourceSpec, iter_documents
from .store import ByteStore, open_store

__all__ = [
    "BUILTIN_CURRICULA",
    "ByteStore",
    "CropSampler",
    "Curriculum",
    "DataError",
    "SourceSpec",
    "Stage",
    "iter_documents",
    "load_curriculum",
    "open_store",
]
