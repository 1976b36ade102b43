"""Codecs: from named tensors to a flat buffer and back, with an exact byte count for each."""

from federated.codecs.codec import Codec, codec_from_name, valid_codec_names, with_error_feedback

__all__ = ["Codec", "codec_from_name", "valid_codec_names", "with_error_feedback"]
