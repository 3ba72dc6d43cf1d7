"""Files that other libraries read: Hugging Face checkpoints and PEFT adapters."""

from .hub import find_checkpoint as find_checkpoint
from .names import NameTable as NameTable, Published as Published, Row as Row
from .peft import load_adapter as load_adapter, save_adapter as save_adapter
