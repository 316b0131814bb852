"""Writes split GGUF files, as llama.cpp's gguf-split does."""

from __future__ import annotations

from pathlib import Path

import gguf

COUNT = 3
_ADDERS = {gguf.GGUFValueType.UINT32: "add_uint32", gguf.GGUFValueType.FLOAT32: "add_float32",
           gguf.GGUFValueType.STRING: "add_string", gguf.GGUFValueType.ARRAY: "add_array"}


def split(whole: Path, folder: Path, *, first_has_tensors: bool = True) -> list[Path]:
    """The metadata goes into the first part; each third tensor into one, or each second into one of the others."""
    reader = gguf.GGUFReader(whole)
    parts = [folder / f"model-{number + 1:05}-of-{COUNT:05}.gguf" for number in range(COUNT)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "qwen2")
        if number == 0:
            for name, field in reader.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    getattr(writer, _ADDERS[field.types[0]])(name, field.contents())
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", COUNT)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        begin, step = (number, COUNT) if first_has_tensors else (number - 1, COUNT - 1)
        for tensor in reader.tensors[begin::step] if begin >= 0 else []:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts
