"""llama.cpp's multimodal library as a consumer: projected features of one image, by llama-cpp-python's `mtmd_cpp`.

The library asks for a text model beside the mmproj file. One with a single small block is written for it: only its
vocabulary and its width are read here.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import ExportError

TESTED_VERSION = "0.3.36"
"""llama-cpp-python release whose llama.cpp reads the position rows as `gguf_file` writes them."""

_HEAD_DIM = 32
_FEED_FORWARD = 32
_VOCABULARY = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁")


def _libraries() -> tuple[Any, Any]:
    """Return llama-cpp-python's bindings of libllama and libmtmd, from wherever this process imports them."""
    return importlib.import_module("llama_cpp"), importlib.import_module("llama_cpp.mtmd_cpp")


def llama_version() -> str:
    """Return the version of llama-cpp-python."""
    llama_cpp, _ = _libraries()
    return str(llama_cpp.__version__)


class MtmdSession:
    """An mmproj file loaded by libmtmd on the CPU; its memory is freed with it.

    Args:
        path: the file.
        width: width of its projected features.

    Raises:
        ExportError: the library cannot load the file.
    """

    def __init__(self, path: Path, width: int) -> None:
        llama_cpp, mtmd = _libraries()
        llama_cpp.llama_backend_init()
        model: Any = _load_text_model(width)
        params: Any = mtmd.mtmd_context_params_default()
        params.use_gpu, params.warmup, params.print_timings = False, False, False
        params.n_threads = os.cpu_count() or 1
        context: Any = mtmd.mtmd_init_from_file(os.fsencode(path), model, params)
        if not context:
            llama_cpp.llama_model_free(model)
            raise ExportError(
                f"libmtmd of llama-cpp-python {llama_version()} cannot load {path.name}; what it says stands above. "
                f"Tested is {TESTED_VERSION}."
            )
        self._context, self._width = context, width
        weakref.finalize(self, _free, context, model)

    def encode(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the projected features of the image's first tile, `[N, width]`.

        Args:
            image: RGB, `[S, S, 3]`, of the file's own image size: a single tile.

        Raises:
            ExportError: the library refuses the image.
        """
        _, mtmd = _libraries()
        height, width, _ = image.shape
        pixels = np.ascontiguousarray(image)
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            marker: bytes = mtmd.mtmd_default_marker()
            text = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
            code = mtmd.mtmd_tokenize(
                self._context,
                chunks,
                ctypes.byref(text),
                (ctypes.c_void_p * 1)(bitmap),
                1,  # pyright: ignore[reportArgumentType]
            )
            if code != 0:
                raise ExportError(f"libmtmd cannot prepare an image of {width} x {height} px: code {code}.")
            return self._encode_first(chunks)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _encode_first(self, chunks: Any) -> NDArray[np.float32]:
        _, mtmd = _libraries()
        for number in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk: Any = mtmd.mtmd_input_chunks_get(chunks, number)
            if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                continue
            code = mtmd.mtmd_encode_chunk(self._context, chunk)
            if code != 0:
                raise ExportError(f"libmtmd cannot encode the image: code {code}.")
            num_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            output: Any = mtmd.mtmd_get_output_embd(self._context)
            return np.ctypeslib.as_array(output, shape=(num_tokens, self._width)).copy()
        raise ExportError("libmtmd makes no image of the golden picture.")


def _load_text_model(width: int) -> Any:
    llama_cpp, _ = _libraries()
    with tempfile.TemporaryDirectory(prefix="distill-mtmd-") as folder:
        file = Path(folder, "text.gguf")
        write_text_model(file, width)
        model = llama_cpp.llama_model_load_from_file(os.fsencode(file), llama_cpp.llama_model_default_params())
    if not model:
        raise ExportError(f"llama-cpp-python {llama_version()} cannot load a text model of width {width}.")
    return model


def _free(context: Any, model: Any) -> None:
    llama_cpp, mtmd = _libraries()
    mtmd.mtmd_free(context)
    llama_cpp.llama_model_free(model)


def write_text_model(path: Path, width: int) -> None:
    """Write a llama of one small block and a vocabulary of bytes: the least that llama.cpp loads.

    Args:
        path: the file.
        width: of its embeddings, which an mmproj file must match.
    """
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(1)
    writer.add_key_length(_HEAD_DIM)
    writer.add_value_length(_HEAD_DIM)
    writer.add_rope_dimension_count(_HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(_VOCABULARY))
    writer.add_token_scores([0.0] * len(_VOCABULARY))
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256, TokenType.NORMAL]
    writer.add_token_types([int(kind) for kind in kinds])
    for name, shape in _text_shapes(width).items():
        writer.add_tensor(name, np.full(shape, 0.01, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _text_shapes(width: int) -> dict[str, tuple[int, ...]]:
    words = len(_VOCABULARY)
    return {
        "token_embd.weight": (words, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.attn_q.weight": (_HEAD_DIM, width),
        "blk.0.attn_k.weight": (_HEAD_DIM, width),
        "blk.0.attn_v.weight": (_HEAD_DIM, width),
        "blk.0.attn_output.weight": (width, _HEAD_DIM),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.ffn_gate.weight": (_FEED_FORWARD, width),
        "blk.0.ffn_up.weight": (_FEED_FORWARD, width),
        "blk.0.ffn_down.weight": (width, _FEED_FORWARD),
    }
