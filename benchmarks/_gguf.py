"""A GGUF model with its matrices in another format, so that two engines read the same numbers."""

from __future__ import annotations

from pathlib import Path


def rewrite(source: Path, target: Path, matrices: str) -> None:
    """Writes the model of `source` with its matrices as `F16`, `Q8_0` or another type; the rest stays."""
    import gguf

    kind = gguf.GGMLQuantizationType[matrices]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    skipped = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if not key.startswith(skipped):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{matrices}"])
    if kind != gguf.GGMLQuantizationType.F16:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
