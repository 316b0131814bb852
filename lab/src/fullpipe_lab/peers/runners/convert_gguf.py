"""GGUF to a folder as transformers writes it: dequantised and rounded to the dtype, as Fullpipe reads the file.

    convert_gguf.py FILE FOLDER DTYPE

For peers that cannot compute in GGUF's own types on a CPU. Runs in the transformers environment.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(file: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
